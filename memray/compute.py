"""The devices that a trial runs on, as a part of its spec."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from memray.accelerators import accelerator
from memray.part import NOT_HASHED, Part, Positive


class ComputeSpec(Part):
    """The devices a trial runs on: part of its identity, because they decide the last bits of every number.

    Engine, workers, stage and offload that a spec leaves open are chosen by `placement.py`.

    Attributes:
        engine: Who computes a training step: plain torch on one device, or DeepSpeed on many.
        accelerator: A row of the accelerator table; "cpu" is the machine the trial runs on.
        workers: Processes of the DeepSpeed engine, a device each. A step's strings are shared out among them; if
            it has fewer strings than workers, each worker gets all of them, and memory alone is shared.
        zero_stage: What ZeRO shards over the workers: 0 nothing, 1 the optimiser's state, 2 gradients too, 3 weights
            too.
        offload: What ZeRO keeps in the memory of the host: "optimiser" from stage 1, "parameters" (and the optimiser)
            at stage 3.
        threads: CPU threads, set in every process that computes; never read from the machine.
        precision: None means fp32 on the CPU, bf16 with fp32 master weights elsewhere.
        device_share: Share of one accelerator that a trial asks for. It places work, so it is not hashed.
        checkpoint_s: Seconds of training between two checkpoints; 0 makes one before every epoch. Not hashed.
        logs_communication: Whether DeepSpeed counts what its workers tell each other, which costs time. Not hashed.
    """

    engine: Literal["torch", "deepspeed"] = "torch"
    accelerator: str = "cpu"
    workers: Positive = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimiser", "parameters"] = "none"
    threads: Positive = 1
    precision: Literal["fp32", "bf16"] | None = None
    device_share: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, json_schema_extra=NOT_HASHED)
    checkpoint_s: Annotated[float, Field(ge=0)] = Field(default=600.0, json_schema_extra=NOT_HASHED)
    logs_communication: bool = Field(default=False, json_schema_extra=NOT_HASHED)

    @field_validator("accelerator")
    @classmethod
    def _in_table(cls, name: str) -> str:
        return accelerator(name).name

    @model_validator(mode="after")
    def _resolved(self) -> "ComputeSpec":
        if self.precision is None:
            object.__setattr__(self, "precision", "fp32" if self.accelerator == "cpu" else "bf16")
        return self

    @model_validator(mode="after")
    def _engine_reads_what_is_set(self) -> "ComputeSpec":
        sharded = {"workers": self.workers, "zero_stage": self.zero_stage, "offload": self.offload}
        idle = [name for name, value in sharded.items() if value != type(self).model_fields[name].default]
        if self.engine == "torch" and idle:
            raise ValueError(
                f"engine 'torch' runs on one device and shards nothing, but got "
                f"{', '.join(f'{name}={sharded[name]!r}' for name in idle)}; set compute.engine='deepspeed', or leave "
                "them out"
            )
        if self.engine == "deepspeed" and self.device_share != 1:
            raise ValueError(
                f"a worker of engine 'deepspeed' takes a whole device, but got device_share={self.device_share}; "
                "leave it out"
            )
        needed = {"none": 0, "optimiser": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"offload={self.offload!r} needs at least zero_stage={needed}, but got zero_stage={self.zero_stage}; "
                "raise the stage, or offload less"
            )
        return self


# The fields of the compute spec that only place or watch work.
UNHASHED = tuple(name for name, field in ComputeSpec.model_fields.items() if field.json_schema_extra == NOT_HASHED)
