"""Options of `predictive`, apart from its code so that they can be shown and checked without importing that."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PredictiveOptions(BaseModel):
    """What the configuration may say below `scheduler.options.predictive`. Work is counted in output tokens."""

    model_config = ConfigDict(extra="forbid")

    aging: float = Field(20.0, gt=0, description="Work that one second of earlier arrival makes up for.")
    prompt_cost: float = Field(0.05, ge=0, description="Work of one prompt token; that of an output token is 1.")
    prior: float = Field(128.0, gt=0, description="Predicted output tokens while nothing has finished yet.")
    memory: int = Field(500, ge=1, description="Finished requests after which a mean begins to forget.")
    label: str = Field("", description="Label that tells kinds of requests apart, e.g. 'task'; empty: none.")
