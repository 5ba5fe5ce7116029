"""Every setting of the tool, with its type, unit, default and the source of the default.

The models read from and write to YAML; a setting that is not known is an error, never ignored.
`None` for a setting that a method decides (position, vectors, zero_init) means "as the method was published".
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from lesa_ray.errors import UserError, first_line
from lesa_ray.machines import OneGpu
from lesa_ray.places import shown
from lesa_ray.sizes import Bytes

SvdRoute = Literal["auto", "exact", "gram", "randomized", "none"]
PredictorKind = Literal["mlp", "ridge"]
Weighing = Literal["direction", "energy"]
Scaling = Literal["none", "unit"]
NormRule = Literal["predicted", "neighbours"]
VectorRule = Literal["lower", "mean", "first"]
Recipe = Literal["paper", "released-code"]
DtypeName = Literal["float32", "float16", "bfloat16"]


def numbers(value: object) -> object:
    """`0.5,1.0` is two."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return tuple(piece for part in parts for piece in str(part).split(",") if piece.strip())


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _knots(value: object) -> object:
    return (value,) if isinstance(value, int | float) else numbers(value)


Seed = Annotated[int, Field(ge=0)]
"""NumPy's generators take no negative one."""
NewWidth = Annotated[float, Field(gt=0, le=64)]
Several = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""A field of several strings; one alone may be given as it is."""


def all_shown(content: Any) -> Any:
    """Settings, or what else JSON can hold, with places as others may see them."""
    if isinstance(content, str):
        return shown(content)
    if isinstance(content, dict):
        return {name: all_shown(value) for name, value in content.items()}
    return [all_shown(value) for value in content] if isinstance(content, list | tuple) else content


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if get_origin(annotation) is not Literal else set()


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, and numbers that are none (NaN, infinity).

    As JSON, which is what records and fingerprints take, places are as others may see them (`shown`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """`workers: yes` would be one."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"must be a number, found {str(value).lower()}")
        return value

    @model_serializer(mode="wrap")
    def _without_secrets(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return all_shown(content) if info.mode == "json" else content


class LesaSettings(Settings):
    """LESA's spectral step and predictor (arXiv 2502.13794; released notebooks: github.com/yangyifei729/LESA)."""

    svd: SvdRoute = "auto"
    """How the common basis U Σ is found; `none` is the paper's ablation without SVD (coefficients = weights)."""
    rank: int | None = Field(default=None, ge=1)
    """Singular directions kept. By default all min(d1, layers·d2) of them (the paper)."""
    oversampling: int = Field(default=10, ge=0)
    """Extra random directions of the randomised route (Halko, Martinsson, Tropp 2011, section 4.2)."""
    power_iterations: int = Field(default=2, ge=0)
    """Power iterations of the randomised route; 2 suffice for slowly decaying spectra (ibid., section 4.5)."""
    weigh: Weighing = "direction"
    """What the predictor's error is measured in: `direction`, V, where all singular directions count alike (the paper
    and its code), or `energy`, ΣV, where the error is that of W itself, as U is orthonormal (ours)."""
    scale: Scaling = "none"
    """`unit` multiplies all coefficients by one number that makes their mean square 1 (ours). As published an entry of
    V has the size 1/√(layers·d2), 0.002 at 24 layers of 8,192 columns, far below what a fresh network puts out, so that
    its training begins by unlearning that. Ridge is the same either way."""
    norms: NormRule = "predicted"
    """`neighbours` sets the Frobenius norm of each predicted matrix to the mean of its two neighbours' (ours): a
    regression shrinks what it cannot predict. The report's norm ratio is that before."""
    predictor: PredictorKind = "mlp"
    """What predicts a layer from its neighbours: the paper's network, or ridge regression in closed form, far quicker.

    It takes no training, and is often no worse; see `ridge`."""
    ridge: float = Field(default=1e-3, gt=0)
    """λ of the ridge regression, relative to the mean diagonal of its normal equations. 1e-3 is small enough to fit
    what there is, and large enough that fewer rows than unknowns, or equal layers, leave it well conditioned.
    Where R² on held-out layers is far below that on training layers (few layers, wide inputs), take a larger one."""
    share_experts: bool = False
    """One basis and one predictor for all experts of a kind (gate, up, down), instead of one for each expert.

    It is trained on the triples of all of them. A new expert is predicted from those of its number."""
    ridge_yardstick: bool = True
    """Fit ridge beside the network too and report both. It adds about a fifth to the training time at 1,024 input
    features, and more where there are more."""
    hidden: int = Field(default=256, ge=1)
    """Width of both hidden layers of the predictor (paper, section 4.1)."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the training rows: 5 in the paper, 10 in the released code."""
    norm_weight: float = Field(default=5e-5, ge=0, le=1)
    """λ of (1-λ)·MSE + λ·norm loss: 5e-5 in the paper, 5e-4 in the released code."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW learning rate (released code; the paper does not say)."""
    batch_size: int = Field(default=64, ge=1)
    """Rows in a batch (released code)."""
    holdout: float = Field(default=0.2, ge=0, lt=1)
    """Share of layer triples kept out of training for the held-out figures: 120/30 split of the paper, 0 in the code.

    0 trains on all of them and reports no held-out figures."""

    @model_validator(mode="after")
    def _rank_needs_directions(self) -> LesaSettings:
        if self.svd == "none" and self.rank is not None:
            raise ValueError(f"rank {self.rank} with svd none: without a decomposition there are no directions to keep")
        return self

    @classmethod
    def from_recipe(cls, recipe: Recipe, **changes: object) -> LesaSettings:
        """The paper's values, or those of the released notebooks where they differ, with `changes` on top."""
        return cls.model_validate({**(_RELEASED if recipe == "released-code" else {}), **changes})


_RELEASED = {"epochs": 10, "norm_weight": 5e-4, "holdout": 0.0}
"""What the released notebooks have other than the paper."""


class ExpandConfig(Settings):
    """One expansion: a base checkpoint, where new layers go, and how they are filled."""

    base: str
    """Checkpoint to grow: a folder, a Hugging Face repo id, or an fsspec URL."""
    out: str
    """Where the expanded checkpoint goes: a folder or an fsspec URL."""
    method: str = "lesa"
    """lesa, llama-pro, solar, opt-deus, avg-deus, aligned-lesa, mean-aligned; random, copy (controls); auto: what
    measured best.

    Names of the method registry (`lesa_ray.expansion.registry`)."""
    factor: float | None = None
    """Layers afterwards over layers before. By default 1.5 (the papers' 32 → 48) unless `layers` or gaps are given."""
    layers: int | None = None
    """Layers afterwards, instead of `factor`."""
    position: str | None = None
    """Where new layers go: top, middle, bottom, ends, uniform, most-important, least-important, or gaps as in `15-30`
    or `1,5,9`. By default as the method was published."""
    importance: str | None = None
    """analysis.json of BASE (a file or URL), for the positions most-important and least-important.

    From `lesa-ray analyze BASE --data …`: new layers go above those whose block influence is largest or smallest."""
    zero_init: bool | None = None
    """Zero the new layers' output projections, through which they write into the residual stream. By default as
    published."""
    output_scale: float | None = Field(default=None, ge=0, le=1)
    """Multiply those projections by this instead, between 0 (the same as `zero_init`) and 1.

    A gate on each new layer, as residual branches are started small in SkipInit (arXiv 2002.10444) and ReZero (arXiv
    2003.04887). None: as `zero_init` says."""
    vectors: VectorRule | None = None
    """Where the 1-D tensors (norms, biases) of a new layer come from. By default as published."""
    new_width: Annotated[tuple[NewWidth, ...], BeforeValidator(_knots), Field(min_length=1)] | None = None
    """New layers' FFN and query heads over their neighbours': 0.5, or 0.5,1.0 from the lowest to the highest; of a
    Llama, Mistral, Qwen2 or Qwen3. By default 1.

    Several factors are spread evenly over the new layers, with straight lines between (`expansion.widths`). A base that
    is not layer-wise scaled becomes one, for which it has to be of those families."""
    recipe: Recipe = "paper"
    """Where a paper and its released code differ, the paper's choice or the code's."""
    lesa: LesaSettings = LesaSettings()
    """Settings of LESA."""
    variants: tuple[str, ...] = ()
    """Other checkpoints of the same shape whose layer triples join LESA's training rows (paper, section 4.4)."""
    seed: Seed = 0
    """Of all random numbers."""
    shard_size: str = "5GB"
    """Largest file of the result, in bytes or with a unit (KB, MB, GB, KiB, MiB, GiB)."""
    dtype: DtypeName | None = None
    """Element type of the result. By default each tensor's own."""
    gpus_per_task: OneGpu | None = None
    """The GPU, or the part of one, that a unit of work asks Ray for. By default one where the cluster has GPUs, else
    none."""
    memory_budget: Bytes | None = None
    """Host memory of one unit of work beside the interpreter's, e.g. 8GB; LESA's coefficients that do not fit go to a
    file in LESA_RAY_SCRATCH. By default four fifths of what is free where it runs.

    Without that variable on the node the file lies in its folder for temporary files."""
    cpus_per_task: int = Field(default=1, ge=1)
    """CPU cores and threads of one unit.

    It is part of the result's identity: sums over threads round differently."""

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, data: object) -> object:
        """Fill the LESA settings that were not given from the recipe that was."""
        if isinstance(data, dict) and data.get("recipe") == "released-code":
            given = data.get("lesa", {})
            if isinstance(given, dict):
                data = {**data, "lesa": {**_RELEASED, **given}}
        return data

    @model_validator(mode="after")
    def _one_size(self) -> ExpandConfig:
        if self.factor is not None and self.layers is not None:
            raise ValueError("give factor or layers, not both")
        if self.zero_init is not None and self.output_scale is not None:
            raise ValueError("give zero_init or output_scale, not both; zero_init is output_scale 0")
        return self


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Nested settings with names such as `optimizer.lr`, for what knows one level only."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


Kind = TypeVar("Kind", bound=Settings)


def load_settings(kind: type[Kind], path: str | None, /, **given: object) -> Kind:
    """Settings from a YAML file (a path or an fsspec URL), if one is named, with the values `given` on top.

    What is None or empty does not count as given; a mapping is merged into the file's key by key.
    Raises: UserError if the file cannot be read or is not a mapping, or naming the first setting that is missing,
    unknown or wrong.
    """
    data = {} if path is None else read_yaml(path)
    for name, value in given.items():
        if isinstance(value, dict):
            inner = data.get(name)
            if inner is None or isinstance(inner, dict):  # anything else is wrong, and stays to be refused
                data[name] = {**(inner or {}), **value}
        elif value is not None and value != () and value != []:
            data[name] = value
    return validated(kind, data, "options" if path is None else f"config {path}")


class _Loader(yaml.SafeLoader):
    """Refuses a setting that is given twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, object]:
    """A YAML file's mapping. Raises: UserError; MachineError if its store does not answer."""
    from lesa_ray.checkpoint.storage import read_file

    content = read_file(os.path.expanduser(path), f"config {path}")
    try:
        data = yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"config {path}: {line}{error.problem or first_line(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected a mapping of settings, found {type(data).__name__}")
    if found := next(_infinite(data), None):
        raise UserError(f"config {path}: {found}: is not a finite number")
    return data


def _infinite(value: object, name: str = "") -> Iterator[str]:
    """Names of numbers that are NaN or infinite, which JSON has no word for, however deep they lie."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    if isinstance(value, list):
        for one in value:
            yield from _infinite(one, name)
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _infinite(one, f"{name}.{key}" if name else str(key))


def validated(kind: type[Kind], data: Mapping[str, object], where: str) -> Kind:
    """`data` as settings. Raises: UserError naming the first that is missing, unknown or wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        if first["type"] == "missing":
            raise UserError(f"{name.upper()}: missing; give it on the command line or in --config FILE") from error
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {name}: {message}" if name else f"{where}: {message}") from error
