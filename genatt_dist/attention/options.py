"""What `model.attention` may be: one section a type, with the options of MATH §3–§6. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genatt_dist.attention import schedule
from genatt_dist.section import Section


class DotProductAttention(Section):
    """SASRec's attention with query, key and value projections: the control every claim is held against."""

    type: Literal["dot_product"] = "dot_product"


class NoisyDotProductAttention(Section):
    """Control: dot-product attention whose logits carry Gaussian noise, as much as a generated map varies (MATH §6)."""

    type: Literal["noisy_dot_product"] = "noisy_dot_product"
    noise: float = Field(1.0, gt=0, description="Standard deviation of the noise of a logit.")
    inference: Literal["mean", "sample"] = Field("mean", description="Without the noise, or with it.")


class PositionalAttention(Section):
    """Control: a learned map that knows positions and no content (MATH §6)."""

    type: Literal["positional"] = "positional"
    value_projection: bool = Field(False, description="V = X W_V instead of V = X.")


class RecurrentAttention(Section):
    """Control: the encoder's state in place of attention (MATH §6)."""

    type: Literal["gru"] = "gru"


class DecodedAttention(Section):
    """What all maps decoded from the encoder's states share (MATH §3)."""

    form: Literal["factor", "matrix"] = "factor"
    rank: int = Field(16, ge=1, description="r: width of the generated query of a head (factor form).")
    latent_size: int = Field(32, ge=1, description="d_z")
    generator_size: int = Field(128, ge=1, description="d_h: width of decoder and denoiser.")
    decoder: Literal["mlp", "linear"] = "mlp"
    decoder_input: Literal["states", "states_items", "latent"] = Field(
        "states", description="c_i = S_i, [S_i; X_i] or nothing."
    )
    condition: Literal["prefix", "last"] = Field("prefix", description="Row i sees S_i, or every row the last state.")
    relative_bias: bool = Field(
        True, description="Learned bias b_{i-j} on factor-form logits; ignored by the matrix form, which has its own."
    )
    query_projection: bool = Field(False, description="Add x W_Q to the generated query (factor form).")
    value_projection: bool = Field(False, description="V = X W_V instead of V = X.")

    @model_validator(mode="after")
    def _form_has_query(self) -> DecodedAttention:
        if self.query_projection and self.form == "matrix":
            raise ValueError(
                "query_projection=true with form=matrix: only the factor form has a query to project; "
                "use form=factor, or query_projection=false"
            )
        return self


class DeterministicAttention(DecodedAttention):
    """Control: the generator of V-GenAtt with σ = 0, trained so (MATH §6)."""

    type: Literal["deterministic"] = "deterministic"


class GeneratedAttention(DecodedAttention):
    """What V-GenAtt and D-GenAtt share: a latent with a prior (MATH §4)."""

    free_bits: float = Field(0.05, ge=0, description="nat per latent dimension that the KL is not pushed below.")
    gamma: float = Field(1.0, ge=0, description="Weight of the generative loss.")
    gamma_warmup: float = Field(0.1, ge=0, le=1, description="Share of all steps over which gamma rises from 0.")


class VariationalAttention(GeneratedAttention):
    """V-GenAtt: each row's map is decoded from a Gaussian latent (MATH §4)."""

    type: Literal["variational"] = "variational"
    train_samples: int = Field(1, ge=1, description="K of the importance-weighted bound -log 1/K sum p(y|z_k).")
    inference: Literal["mean", "sample", "mc"] = "mean"
    mc_samples: int = Field(16, ge=1, description="M: maps averaged by inference=mc.")


class DiffusionAttention(GeneratedAttention):
    """D-GenAtt: each row's map is denoised from Gaussian noise (MATH §5)."""

    type: Literal["diffusion"] = "diffusion"
    diffusion_steps: int = Field(50, ge=1, description="T")
    schedule: Literal["linear", "cosine"] = "linear"
    train_sampler: Literal["one_step", "unrolled"] = "one_step"
    rec_mix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="rho: share of sequences ranked through the denoised map. At 1 the decoder, whose g_0 is then "
        "never ranked, stays as it was initialised.",
    )
    diffused_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of sequences that are diffused in a training step, weighted by its inverse; "
        "default: 0.5, or rec_mix where that is more.",
    )
    latent_weight: float = Field(
        0.5, ge=0, description="gamma_z: weight of the latent's KL inside the generative loss."
    )
    sampling_steps: int = Field(4, ge=1, description="S: DDIM steps at inference.")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM noise: 0 deterministic given R_T, 1 ancestral.")
    sample_blocks: Literal["all", "last"] = Field(
        "all",
        description="Blocks that sample at inference; the others use the mean map. A map that all blocks share is "
        "sampled.",
    )
    literal: bool = Field(False, description="Diffuse g_0 itself: m = 0, sigma = 1.")

    @model_validator(mode="after")
    def _possible(self) -> DiffusionAttention:
        if self.sampling_steps > self.diffusion_steps:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} is more than diffusion_steps={self.diffusion_steps}: "
                f"set sampling_steps to at most {self.diffusion_steps}"
            )
        if self.diffused_share is not None and self.diffused_share < self.rec_mix:
            raise ValueError(
                f"diffused_share={self.diffused_share} is less than rec_mix={self.rec_mix}: sequences ranked through "
                f"the denoised map are among the diffused ones; set diffused_share to at least {self.rec_mix}"
            )
        if self.rec_mix == 0 and self.train_sampler == "unrolled":
            raise ValueError(
                "train_sampler=unrolled with rec_mix=0: all T steps would run and nothing be ranked by what they give; "
                "use train_sampler=one_step, or rec_mix above 0"
            )
        if self.rec_mix == 0 and self.gamma == 0:
            raise ValueError("gamma=0 with rec_mix=0: nothing would train the denoiser; set one of them above 0")
        schedule.check(self.schedule, self.diffusion_steps)
        return self

    @property
    def share(self) -> float:
        """Probability that a sequence is diffused in a training step."""
        return self.diffused_share or max(0.5, self.rec_mix)


class HybridAttention(Section):
    """G = G_gen + α·QKᵀ/√d, α learned from 0: does a deterministic part add to the generated one (MATH §6)?"""

    type: Literal["hybrid"] = "hybrid"
    generator: Annotated[VariationalAttention | DiffusionAttention, Field(discriminator="type")] = (
        VariationalAttention()
    )


Attention = Annotated[
    DotProductAttention
    | NoisyDotProductAttention
    | PositionalAttention
    | RecurrentAttention
    | DeterministicAttention
    | VariationalAttention
    | DiffusionAttention
    | HybridAttention,
    Field(discriminator="type"),
]
