"""What a user would write instead: Hugging Face's `Trainer`, a callback that measures each epoch, and MLflow.

Recipe, measures and schedule are ours. Nothing is saved, neither checkpoints nor per-token records.

    python with_trainer.py alone DATABASE_URI SCRATCH NUMBER seeds=5 length=256 epochs=100    one trial
    python with_trainer.py tune DATABASE_URI SCRATCH COUNT seeds=5 length=256 epochs=100      the first trials

With Tune, two trials run at a time and Ray's own callback talks to MLflow; it prints the seconds of the trials, which
begin when the cluster stands.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ray's daemons listen on every interface: without a token anybody could run code here.
os.environ["RAY_AUTH_MODE"] = "token"

from transformers import Trainer, TrainerCallback, TrainingArguments

from memray.material import Material, prepare
from memray.measurement import Measurer
from memray.models import load_model
from memray.scoring import score
from memray.spec import TrialSpec
from memray.sweep import Sweep, load

Log = Callable[[dict[str, float], int], object]


class MeasureEachEpoch(TrainerCallback):
    """Measures the trained string at every epoch, the held-out strings at the probe epochs."""

    def __init__(self, spec: TrialSpec, material: Material, log: Log) -> None:
        self.spec = spec
        self.material = material
        self.alphabet = material.alphabet
        self.measurer = Measurer(spec, material.known_trained, material.known_held_out)
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measure(model, 0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measure(model, round(state.epoch))

    def measure(self, model: Any, epoch: int) -> None:
        held_out, is_last = self.material.held_out, epoch == self.spec.num_epochs
        is_probe_epoch = epoch in self.spec.probes.epochs or is_last
        model.eval()
        trained = score(model, self.material.trained, self.alphabet)
        probed = score(model, held_out, self.alphabet) if held_out and is_probe_epoch else None
        model.train()
        self.log(self.measurer.measure(epoch, trained, probed, is_last=is_last).metrics, epoch)


def train(spec: TrialSpec, scratch: str, log: Log, *, report_to: str) -> None:
    """One trial of one string; `log` is told the metrics of each epoch."""
    material = prepare(spec)
    assert spec.training.learning_rate is not None
    arguments = TrainingArguments(
        output_dir=scratch,
        run_name=spec.trial_id(),
        use_cpu=True,
        per_device_train_batch_size=1,
        num_train_epochs=spec.num_epochs,
        learning_rate=spec.training.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=spec.training.clip_norm,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=report_to,
    )
    Trainer(
        model=load_model(spec.model, seed=spec.model_seed),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in material.trained.ids],  # type: ignore[arg-type]
        callbacks=[MeasureEachEpoch(spec, material, log)],
    ).train()


def train_alone(sweep: Sweep, uri: str, scratch: str, number: int) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    train(sweep.trials[number], scratch, lambda metrics, epoch: mlflow.log_metrics(metrics, epoch), report_to="mlflow")


def train_in_tune(config: dict[str, Any]) -> None:
    """Tune's function: one trial."""
    from ray import tune

    spec = TrialSpec.model_validate_json(config["trial"]["spec"])
    train(spec, config["scratch"], lambda metrics, epoch: tune.report(metrics), report_to="none")


def train_with_tune(sweep: Sweep, uri: str, scratch: str, count: int) -> None:
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    began = time.perf_counter()
    trials = [{"id": spec.trial_id(), "spec": spec.model_dump_json()} for spec in sweep.trials[:count]]
    results = tune.Tuner(
        tune.with_resources(train_in_tune, {"cpu": 1}),
        param_space={"trial": tune.grid_search(trials), "scratch": scratch},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=2, trial_name_creator=lambda trial: trial.config["trial"]["id"]
        ),
        run_config=tune.RunConfig(
            storage_path=scratch, verbose=0, callbacks=[MLflowLoggerCallback(uri, experiment_name="tune")]
        ),
    ).fit()
    seconds = time.perf_counter() - began
    if results.errors:
        raise SystemExit(str(results.errors[0]))
    print(seconds)


def main() -> None:
    how, uri, scratch, number, *pairs = sys.argv[1:]
    sweep = load(Path(__file__).with_name("tiny_trials.py"), **dict(pair.split("=") for pair in pairs))
    {"alone": train_alone, "tune": train_with_tune}[how](sweep, uri, scratch, int(number))


if __name__ == "__main__":
    main()
