"""How many tokens a request will use: estimates that calibrate themselves on what was used."""

import math
from statistics import median

import msgspec

from rxllm.errors import check_number

__all__ = ["TokenErrors", "TokenEstimator"]

PRIOR = 0.25  # tokens a byte
KNOWN = 8  # so many replies, and a kind is known by its own
OUTLIER = math.log(2)  # one reply changes the ratio as if it were at most twice, or half, of what was expected
FADE = 1 / 64  # the weight of the newest reply, when there have been many
FIRST = 5  # of so many the median is taken
ABSURD = 1e9  # tokens: no provider takes or writes more
HEAVY = 1e100  # far from the end of the floats
BINS = 8  # a doubling of the output tokens; a quantile is right within 9 %


class TokenErrors(msgspec.Struct, frozen=True, kw_only=True):
    """How far the estimates were from what was used, relative to that; the later ones weigh more.

    An error of 0.1 is ten percent; a bias above zero is too much estimated. That of the output is meant to be.
    """

    replies: int = 0
    input_error: float = 0.0
    input_bias: float = 0.0
    output_error: float = 0.0
    output_bias: float = 0.0


class TokenEstimator:
    """Estimates input and output tokens per model and kind of request.

    Input: a ratio of tokens to the size of the prompt: the median of the first five, then the mean of logarithms (so
    that too much and too little weigh the same), where an outlier counts for no more than a factor of two. Give the
    size in UTF-8 bytes: a character outside ASCII is 2 to 4 of them, and tokenizers of bytes spend about as many more
    tokens on it (a Chinese character is 3 bytes and about 3/4 of a token), so that one prior of 4 bytes a token serves
    all languages. What is the same in each request of a kind (a chat frame, tools, a system prompt that is not in the
    size) goes into the ratio.

    Output: a quantile of what this kind of request used, from a histogram on a logarithmic scale in which what is
    old fades; never more than `max_tokens`. Until a kind is known it is `max_tokens`, and without that the same
    quantile over all kinds of the model, and before that `unknown`.

    Args:
        quantile: Which share of the outputs is to be within the estimate.
        unknown: Output tokens of a request without `max_tokens`, before anything is known.
        most: Kinds that are remembered; the one not used for longest goes first.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> tokens = TokenEstimator()
    >>> tokens.estimate("gpt", "haiku", 400, 1000)
    (100.0, 1000.0)
    >>> for _ in range(50):
    ...     tokens.learn("gpt", "haiku", 400, 1000, input_tokens=120, output_tokens=30)
    >>> [round(number) for number in tokens.estimate("gpt", "haiku", 400, 1000)]
    [120, 31]
    """

    __slots__ = ("_errors", "_kinds", "_most", "_quantile", "_unknown")

    def __init__(self, *, quantile: float = 0.9, unknown: float = 512.0, most: int = 1024) -> None:
        check_number("quantile", quantile, above=0, most=1)
        check_number("unknown", unknown, least=0)
        check_number("most", most, least=1, integer=True)
        self._quantile = quantile
        self._unknown = unknown
        self._most = most
        self._kinds: dict[tuple[str, str | None], _Kind] = {}  # the one used last is last; None is all of a model
        self._errors = TokenErrors()

    def estimate(self, model: str, kind: str, characters: float, max_tokens: float | None) -> tuple[float, float]:
        """Return the input and output tokens that a request will use.

        Args:
            model: Which one is asked.
            kind: What requests of about the same length of answer have in common: an operation, a prompt's name.
            characters: The size of the prompt, best in UTF-8 bytes.
            max_tokens: The most output tokens that it asks for; None: it does not say.
        """
        own, common = self._kinds.get((model, kind)), self._kinds.get((model, None))
        inputs = characters * math.exp((own or common or NEW).ratio)
        if own is not None and own.outputs >= KNOWN:
            outputs = own.quantile
        elif max_tokens is not None:
            outputs = max_tokens
        else:
            outputs = self._unknown if common is None or common.outputs < KNOWN else common.quantile
        return inputs, float(outputs if max_tokens is None else min(outputs, max_tokens))

    def learn(
        self,
        model: str,
        kind: str,
        characters: float,
        max_tokens: float | None,
        *,
        input_tokens: float | None,
        output_tokens: float | None,
    ) -> None:
        """Learn from the usage of a reply.

        Args:
            model: As for `estimate`.
            kind: The same.
            characters: The same.
            max_tokens: The same.
            input_tokens: What was used; None: it was not said. Only whole prompts teach: cached tokens are in it.
            output_tokens: The same.
        """
        inputs, outputs = self.estimate(model, kind, characters, max_tokens)
        self._note(_relative(inputs, input_tokens), _relative(outputs, output_tokens))
        sample = None
        if input_tokens is not None and 0 < input_tokens <= ABSURD and characters >= 1:
            sample = math.log(input_tokens / characters)
        output = output_tokens if output_tokens is not None and 0 <= output_tokens <= ABSURD else None
        for name in (None, kind):
            found = self._kinds.pop((model, name), None)
            if found is None:
                common = self._kinds.get((model, None), NEW)
                found = _Kind(common.ratio, self._quantile)
                while len(self._kinds) >= self._most:
                    del self._kinds[next(iter(self._kinds))]
            self._kinds[model, name] = found
            if sample is not None:
                found.learn_input(sample)
            if output is not None:
                found.learn_output(output)

    def errors(self) -> TokenErrors:
        """Return how good the estimates have been."""
        return self._errors

    def _note(self, inputs: float | None, outputs: float | None) -> None:
        old = self._errors
        weight = max(FADE, 1 / (old.replies + 1))

        def mean(before: float, value: float | None) -> float:
            return before if value is None else before + weight * (value - before)

        self._errors = TokenErrors(
            replies=old.replies + 1,
            input_error=mean(old.input_error, None if inputs is None else abs(inputs)),
            input_bias=mean(old.input_bias, inputs),
            output_error=mean(old.output_error, None if outputs is None else abs(outputs)),
            output_bias=mean(old.output_bias, outputs),
        )


def _relative(estimate: float, actual: float | None) -> float | None:
    return None if actual is None or not 0 < actual <= ABSURD else (estimate - actual) / actual


class _Kind:
    """What is known of one kind of request."""

    __slots__ = ("_bins", "_first", "_inputs", "_share", "_sum", "_weight", "outputs", "quantile", "ratio")

    def __init__(self, ratio: float, share: float) -> None:
        self.ratio = ratio  # the logarithm of tokens a byte
        self.outputs = 0  # how many are known
        self.quantile = 0.0
        self._inputs = 0
        self._first: list[float] = []
        self._share = share
        self._weight = 1.0  # of the next reply: it grows, instead of all others fading
        self._bins: dict[int, float] = {}
        self._sum = 0.0

    def learn_input(self, sample: float) -> None:
        self._inputs += 1
        if self._inputs <= FIRST:
            self._first.append(sample)
            self.ratio = median(self._first)
        else:
            change = min(OUTLIER, max(-OUTLIER, sample - self.ratio))
            self.ratio += max(FADE, 1 / self._inputs) * change

    def learn_output(self, tokens: float) -> None:
        place = math.ceil(BINS * math.log2(tokens + 1))
        self._bins[place] = self._bins.get(place, 0.0) + self._weight
        self._sum += self._weight
        self._weight /= 1 - FADE / 4
        if self._weight > HEAVY:
            self._bins = {place: weight / HEAVY for place, weight in self._bins.items() if weight > 1}
            self._sum = sum(self._bins.values())
            self._weight /= HEAVY
        self.outputs += 1
        if self.outputs < 1 / FADE or self.outputs % KNOWN == 0:  # one reply of many changes little
            self._find()

    def _find(self) -> None:
        """Find the quantile: the upper end of its bin."""
        missing = self._share * self._sum * (1 - 1e-12)
        for place in sorted(self._bins):
            missing -= self._bins[place]
            if missing <= 0:
                self.quantile = 2.0 ** (place / BINS) - 1
                return


NEW = _Kind(math.log(PRIOR), 1.0)
