"""The engine of one device on a GPU, against a bare loop over Hugging Face's model: one table.

Models have the shapes of the family table and random weights: nothing is downloaded, and nothing of a cluster is
imported. Both sides train at bf16 with fp32 master weights on the same strings; the bare loop scores nothing. Each
side runs in a process of its own, so that peaks are its own.

Plain gradient descent, not AdamW: its moments would not leave a model of 6.9 thousand million parameters room on one
device (20 bytes a parameter instead of 12), and the matrix products are the same.

    python tests/bench/gpu.py --sizes 1b 6.9b
    python tests/bench/gpu.py --device cpu --sizes tiny --length 64      # where there is no GPU: does it run?
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from memray.accelerators import ACCELERATORS
from memray.cost import shape
from memray.encoding import Batch
from memray.families import family
from memray.finetune import TorchEngine, lower_weights, optimiser
from memray.material import prepare
from memray.models import character_tokenizer, load_model
from memray.spec import ModelSpec, StringsSpec, TrainingSpec, TrialSpec

RATE = 1e-5
SIDES = ("memray", "bare loop")


def spec_of(folder: str, options: argparse.Namespace) -> TrialSpec:
    return TrialSpec(
        model=ModelSpec(path=folder),
        strings=StringsSpec(length=options.length, num_strings=options.strings),
        training=TrainingSpec(strings_per_step=0, optimiser="sgd", learning_rate=RATE),
    )


def save_config(size: str, folder: str) -> None:
    known = family("pythia")
    getattr(transformers, known.config_class)(**known.config_arguments(known.sizes[size])).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def engine_step(spec: TrialSpec, model: nn.Module, device: torch.device) -> Callable[[], Any]:
    material = prepare(spec)
    engine = TorchEngine(model.to(device), material.alphabet, spec.training, device, precision="bf16")
    return lambda: engine.step(material.trained, RATE)


def bare_step(spec: TrialSpec, model: Any, device: torch.device) -> Callable[[], Any]:
    batch: Batch = prepare(spec).trained
    ids = batch.ids.to(device)
    model = model.to(device).train()
    weights = list(model.parameters())
    masters = [nn.Parameter(weight.detach().clone()) for weight in weights]
    lower_weights(model)
    update = optimiser(masters, spec.training)
    for group in update.param_groups:
        group["lr"] = RATE

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(masters, spec.training.clip_norm)
        update.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
                master.grad = None

    return step


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side at one size, in this process."""
    device, size = torch.device(options.device), options.sizes[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        save_config(size, folder)
        spec = spec_of(folder, options)
        model = load_model(spec.model, seed=0)
        make = engine_step if options.side == "memray" else bare_step
        step = make(spec, model, device)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        seconds = []
        for _ in range(3 + options.steps):  # the first ones choose kernels and fill the allocator's cache
            began_s = time.perf_counter()
            step()
            wait()
            seconds.append(time.perf_counter() - began_s)
    median_s = sorted(seconds[3:])[options.steps // 2]
    known, tokens = shape(ModelSpec(size=size)), options.length * options.strings
    # Forward and twice as much backward; causal attention computes half its square.
    flops = tokens * (6 * known.matrix_parameters + 6 * known.num_layers * known.hidden_size * options.length)
    return {
        "size": size,
        "side": options.side,
        "tokens_per_s": tokens / median_s,
        "step_s": median_s,
        "flops_per_s": flops / median_s,
        "peak_gib": peak_gib(device),
    }


def peak_flops(device: str) -> tuple[str, float]:
    """The device's name, and its peak rate at bf16; on the CPU, where nothing is measured, that of one core."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows = [row for row in ACCELERATORS.values() if row.device == device and row.device_name in name]
    return name, rows[0].bf16_flops if rows else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["1b", "6.9b"], choices=[*family("pythia").sizes])
    parser.add_argument("--length", type=int, default=1024, help="tokens a string")
    parser.add_argument("--strings", type=int, default=4, help="strings a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process, and print JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    name, peak = peak_flops(options.device)
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, bf16, "
          f"{options.strings} strings of {options.length} tokens a step, median of {options.steps} steps")  # fmt: skip
    print(f"{'size':>6} {'side':>10} {'tokens/s':>10} {'s/step':>8} {'MFU':>6} {'GiB':>7}")
    for size in options.sizes:
        for side in SIDES:
            command = [sys.executable, __file__, "--device", options.device, "--sizes", size, "--side", side]
            for option in ("length", "strings", "steps"):
                command += [f"--{option}", str(getattr(options, option))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{size:>6} {side:>10} failed, see above")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{size:>6} {side:>10} {row['tokens_per_s']:10.0f} {row['step_s']:8.3f} "
                  f"{row['flops_per_s'] / peak:6.1%} {row['peak_gib']:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
