"""What tokens cost, as the user says: no price is built in, because they change."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm.errors import ConfigError, check_number
from rxllm.values import ConfigErrorMeta

if TYPE_CHECKING:
    import os

    from rxllm.messages import Usage

__all__ = ["Price", "Prices"]


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """What one model costs, in USD for as many tokens as `Prices.per` says.

    Args:
        input: Tokens of the prompt.
        output: Tokens of the answer, with those of its reasoning.
        cached: Tokens of the prompt that were read from a cache. None: as any input.
        cache_write: Tokens of the prompt that were written to a cache. None: as any input.
        batch: What a batch job costs of all this, as a share: 0.5 is half the price. None: nobody has said.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> Price(input=2.0, output=8.0).cached is None
    True
    """

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None
    batch: float | None = None

    def __post_init__(self) -> None:
        check_number("input", self.input, least=0)
        check_number("output", self.output, least=0)
        check_number("cached", self.cached, least=0, optional=True)
        check_number("cache_write", self.cache_write, least=0, optional=True)
        check_number("batch", self.batch, least=0, optional=True)


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """The prices of models, by the name that requests call them by.

    Args:
        models: Name -> price. Names are compared as they are: a dated name is another one.
        per: How many tokens a price is for, > 0.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> from rxllm.messages import Usage
    >>> prices = Prices({"small": Price(input=2.0, output=8.0, cached=0.5)})
    >>> prices.cost(Usage(input_tokens=1_000_000, cached_tokens=400_000, output_tokens=100_000), "small")
    2.2
    """

    models: dict[str, Price]
    per: float = 1_000_000

    def __post_init__(self) -> None:
        check_number("per", self.per, above=0)
        if not isinstance(cast("object", self.models), dict):
            msg = f"models must be a dict of names and prices, got {self.models!r}"
            raise ConfigError(msg)
        for name, price in cast("dict[object, object]", self.models).items():
            if not isinstance(name, str) or not name:
                msg = f"models: a name must be a string that is not empty, got {name!r}"
                raise ConfigError(msg)
            if not isinstance(price, Price):
                msg = f"models: {name!r} must have a Price, got {price!r}"
                raise ConfigError(msg)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prices:
        """Read prices from a file, TOML or JSON by its name's end.

            per = 1_000_000
            [models."some-model"]
            input = 1.5
            output = 6.0

        Args:
            path: The file, UTF-8.

        Raises:
            ConfigError: It cannot be read, or something in it is wrong; the message names the file and the field, or
                the line.
        """
        file = Path(path)
        fields = _decoded(file)
        if not isinstance(fields, dict):
            msg = f"{file}: expected the fields per and models, got a {type(fields).__name__}"
            raise ConfigError(msg)
        table = cast("dict[str, Any]", fields)
        unknown = sorted(set(table) - {"per", "models"})
        if unknown:
            msg = f"{file}: {unknown[0]}: there is no such field; the fields are per and models"
            raise ConfigError(msg)
        models: object = table.get("models")
        if not isinstance(models, dict):
            msg = f"{file}: models must be a table of names and prices, got {models!r}"
            raise ConfigError(msg)
        prices = {name: _price(file, name, price) for name, price in cast("dict[str, object]", models).items()}
        try:
            return cls(prices, per=table.get("per", 1_000_000))
        except ConfigError as wrong:
            reason = str(wrong)
        msg = f"{file}: {reason}"
        raise ConfigError(msg)

    def price(self, model: str) -> Price:
        """Return the price of a model.

        Raises:
            ConfigError: It has none; the message names it.
        """
        found = self.models.get(model)
        if found is None:
            msg = f"prices: there is none for the model {model!r}; there is for {', '.join(self.models) or 'none'}"
            raise ConfigError(msg)
        return found

    def cost(self, usage: Usage, model: str, *, batch: bool = False) -> float:
        """Return what `usage` costs, in USD.

        Args:
            usage: What was used.
            model: The model's name.
            batch: It was a batch job.

        Raises:
            ConfigError: The model has no price, or none for batch jobs.
        """
        price = self.price(model)
        share = price.batch if batch else 1.0
        if share is None:
            msg = f"prices: the price of the model {model!r} has no batch, the share that batch jobs cost"
            raise ConfigError(msg)
        cached, written = usage.cached_tokens, usage.cache_write_tokens
        plain = max(0, usage.input_tokens - cached - written)
        amount = (
            plain * price.input
            + cached * (price.input if price.cached is None else price.cached)
            + written * (price.input if price.cache_write is None else price.cache_write)
            + usage.output_tokens * price.output
        )
        return amount * share / self.per


def _decoded(file: Path) -> object:
    """Return what is in a TOML or JSON file."""
    try:
        text = file.read_text("utf-8-sig")  # some editors put a mark at the beginning
        if file.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if file.suffix.lower() == ".json":
            return json.loads(text)  # it says the line of a mistake
        reason = "its name must end with .toml or .json"
    except OSError as wrong:
        reason = f"it cannot be read: {wrong.strerror}"
    except UnicodeDecodeError as wrong:
        reason = f"it is not UTF-8: {wrong}"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as wrong:  # of both decoders
        reason = str(wrong)
    msg = f"{file}: {reason}"
    raise ConfigError(msg)


def _price(file: Path, name: str, fields: object) -> Price:
    try:
        return msgspec.convert(fields, Price)
    except (msgspec.ValidationError, ConfigError) as wrong:
        reason = str(wrong)
    if isinstance(fields, dict) and any(
        isinstance(value, dict) for value in cast("dict[str, object]", fields).values()
    ):
        reason += f'; a name with a point in it needs quotes: [models."{name}.…"]'
    msg = f"{file}: models.{name}: {reason}"
    raise ConfigError(msg)
