"""What Redis and Valkey do for a shared quota, in one round trip.

    log      sorted set   lease -> when it counts from, in the server's seconds
    amounts  hash         lease -> units
    state    hash         generation, used, level, at, hold
    clients  sorted set   client -> when it was last here
    waits    sorted set   client -> since when it waits
    needs    hash         client -> what it waits for, and until when it is believed to

A sliding log counts a lease for `keep` seconds: `used` is the sum. A bucket keeps its leases only as long as their
units may be on their way, since its level must not flow over what is still to come out of it.

The server's clock is the only one, and every key expires when nobody comes any more.
"""

__all__ = ["EXCHANGE", "KEYS"]

KEYS = ("log", "amounts", "state", "clients", "waits", "needs")

EXCHANGE = """
local log, amounts, state, clients, waits, needs = unpack(KEYS)
local kind, client, known = ARGV[1], ARGV[2], ARGV[3]
local limit, rate = tonumber(ARGV[4]), tonumber(ARGV[5])
local keep, life, memory, patience = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local expiry, hold = ARGV[10], tonumber(ARGV[11])
local lease, extra, carry, debt = ARGV[12], tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local least, wanted, closing = tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18])

local bucket = kind == 'bucket'
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000

local function text(number)
  return string.format('%.17g', number)
end

local function field(name, default)
  return tonumber(redis.call('HGET', state, name) or default)
end

local function leave(reply)
  for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, expiry)
  end
  return reply
end

-- A client that knows another generation has leases that this server has forgotten: all of them shall come and tell.
local generation = redis.call('HGET', state, 'generation')
if not generation then
  generation = clock[1] .. '.' .. clock[2]
  redis.call('HSET', state, 'generation', generation)
end
if known ~= '' and known ~= generation then
  redis.call('HSETNX', state, 'hold', text(now + hold))
  return leave({'lost', generation})
end

-- What counts no more.
local used = field('used', 0)
local over = redis.call('ZRANGEBYSCORE', log, '-inf', text(now - keep))
for _, id in ipairs(over) do
  used = used - tonumber(redis.call('HGET', amounts, id) or 0)
  redis.call('ZREM', log, id)
  redis.call('HDEL', amounts, id)
end
if redis.call('ZCARD', log) == 0 then
  used = 0
end
local level = 0
if bucket then
  level = math.min(limit - used, field('level', limit) + (now - field('at', now)) * rate)
end

-- What comes back, and how much earlier, or later, the rest counts from.
local at = 19
for _ = 1, closing do
  local id, back, early = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  at = at + 3
  local amount = tonumber(redis.call('HGET', amounts, id) or 0)
  if amount > 0 then
    back = math.min(back, amount)
    used = used - back
    level = level + back
    if back == amount then
      redis.call('ZREM', log, id)
      redis.call('HDEL', amounts, id)
    else
      redis.call('HSET', amounts, id, text(amount - back))
      if early ~= 0 then
        redis.call('ZINCRBY', log, text(-early), id)
      end
    end
  elseif id == '' then
    level = math.min(limit - used, level + back)
  end
end

-- What this server does not know: seconds are from now until it counts.
while at < #ARGV do
  local id, amount, begins = ARGV[at], tonumber(ARGV[at + 1]), now + tonumber(ARGV[at + 2])
  at = at + 3
  if bucket then
    level = level - amount
  elseif begins + keep > now then
    used = used + amount - tonumber(redis.call('HGET', amounts, id) or 0)
    redis.call('ZADD', log, text(begins), id)
    redis.call('HSET', amounts, id, text(amount))
  end
end

used = used + debt + carry
level = level - debt - carry

-- Those that waited before this client get what they need before it.
redis.call('ZREMRANGEBYSCORE', clients, '-inf', text(now - memory))
if wanted > 0 then
  redis.call('ZADD', clients, text(now), client)
else
  redis.call('ZREM', clients, client)
end
local mine = tonumber(redis.call('ZSCORE', waits, client) or now)
local reserved = 0
for _, other in ipairs(redis.call('ZRANGEBYSCORE', waits, '-inf', '(' .. text(mine))) do
  local need, due = string.match(redis.call('HGET', needs, other) or '0 0', '(%S+) (%S+)')
  if tonumber(due) < now then
    redis.call('ZREM', waits, other)
    redis.call('HDEL', needs, other)
  else
    reserved = reserved + tonumber(need)
  end
end

local room = level
if not bucket then
  room = limit - used
end
local free = room - reserved
local granted, hint = 0, 0
local held = field('hold', 0)
if wanted > 0 and now < held then
  hint = held - now
elseif wanted > 0 and free >= least then
  local share = math.floor(free / redis.call('ZCARD', clients))
  granted = math.min(wanted, math.max(least, share, 0))
end
if granted > 0 or wanted == 0 then
  redis.call('ZREM', waits, client)
  redis.call('HDEL', needs, client)
elseif hint == 0 then
  hint = patience
  local missing = least - free
  if bucket then
    if rate > 0 then
      hint = missing / rate
    end
  else
    local oldest = redis.call('ZRANGE', log, 0, 63, 'WITHSCORES')
    for i = 1, #oldest, 2 do
      hint = oldest[i + 1] + keep - now
      missing = missing - tonumber(redis.call('HGET', amounts, oldest[i]) or 0)
      if missing <= 0 then
        break
      end
    end
  end
end
hint = math.max(0, math.min(hint, patience))
if granted == 0 and least > 0 then
  redis.call('ZADD', waits, 'NX', text(now), client)
  redis.call('HSET', needs, client, text(least) .. ' ' .. text(now + hint + life + 0.25))
end

local amount = carry + granted + debt
if amount > 0 then
  redis.call('ZADD', log, text(now + life + extra), lease)
  redis.call('HSET', amounts, lease, text(amount))
end
redis.call('HSET', state, 'used', text(used + granted))
if bucket then
  redis.call('HSET', state, 'level', text(level - granted), 'at', text(now))
end
return leave({text(granted), generation, text(room - granted), text(hint)})
"""
