"""Settings of the corpus and of pre-training: type, unit, default, and where the default comes from.

The defaults are those of the demo's base: the best held-out loss found for three minutes and a half on two CPU cores,
from a handful of short runs (300 steps, one seed each), so near the best at most. All but `checkpoint_every` are part
of what a run is: a checkpoint made under other settings is never taken up by mistake.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lesa_ray.config import Settings

Precision = Literal["auto", "float32", "bfloat16"]


class CorpusSettings(Settings):
    """The standard-library corpus and its tokenizer."""

    vocab_size: int = Field(default=4096, ge=300, le=2**16)
    """Entries of the BPE vocabulary: 256 bytes, one end-of-text token, the rest merges. At 4096 a token is about 3.6
    characters of Python; doubling it would double the output head, already a fifth of the demo's parameters."""
    holdout_every: int = Field(default=20, ge=2)
    """One file in so many (by a hash of its path) is held out of training, tokenizer included."""


class PretrainSettings(Settings):
    """A small Llama and how it is pre-trained, in one process."""

    layers: int = Field(default=8, ge=1)
    """Decoder layers: six triples for LESA's predictor to learn from. 12 cost 1.4× a step and learned less in it."""
    width: int = Field(default=192, ge=2)
    """Hidden size d."""
    mlp_width: int = Field(default=512, ge=1)
    """Inner size of the gated MLP: 8/3 of the hidden size (Llama)."""
    heads: int = Field(default=3, ge=1)
    """Query heads; 64 dimensions each: on a CPU few wide heads are faster than many narrow ones."""
    kv_heads: int = Field(default=1, ge=1)
    """Key-value heads (grouped-query attention); divides `heads`."""
    tied: bool = True
    """Output head = embedding: at a million tokens most rows of a separate head would be barely trained."""
    context: int = Field(default=256, ge=2)
    """Tokens a sequence; also the model's `max_position_embeddings`."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences a step. 4 beat 8 on the same 0.3 M tokens (held-out loss 4.91 and 5.19); at 1.5 M they were level."""
    steps: int = Field(default=1500, ge=1)
    """Optimizer steps: 1.5 M tokens, 0.7 of an epoch of the standard library."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak of AdamW's learning rate. Held-out loss with 3e-3 was 0.05 higher, with 6e-3 another 0.6."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear rise from zero to the peak."""
    decay_share: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps, the last ones, over which the rate falls linearly to zero (warm-up, stable, decay). After
    0.3 M tokens: 0.3 gave 4.87, 0.5 4.91, 0.9 5.10."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, on matrices only (GPT-3, Llama)."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient (GPT-3, Llama)."""
    precision: Precision = "auto"
    """Matrix products in bfloat16 (autocast) or float32; `auto`: bfloat16 where the CPU has AMX tiles;
    there a step (batch 8) took 0.21 s instead of 0.31 s."""
    threads: int = Field(default=2, ge=1)
    """CPU threads. Part of what the run is: sums over threads round differently."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints: what a killed run loses at most."""
    seed: int = 0

    @model_validator(mode="after")
    def _heads_fit(self) -> PretrainSettings:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of an even size")
        return self
