"""Options of `watermark`, apart from its code so that they can be shown and checked without importing that."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from interlace_watermark.greenlist import DEFAULT_DELTA, DEFAULT_GAMMA

Key = Annotated[SecretStr, Field(min_length=1)]
Gamma = Annotated[float, Field(gt=0, lt=1)]
Delta = Annotated[float, Field(ge=0, le=100)]


class WatermarkOptions(BaseModel):
    """What the configuration may say below `logits_processors.options.watermark`; a request may say otherwise."""

    model_config = ConfigDict(extra="forbid")

    key: Key | None = Field(None, description="Secret that decides what is green; none: each request brings its own.")
    gamma: Gamma = Field(DEFAULT_GAMMA, description="Share of the vocabulary that is green.")
    delta: Delta = Field(DEFAULT_DELTA, description="Added to the logits of green tokens.")
