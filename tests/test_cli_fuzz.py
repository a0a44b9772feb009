"""Commands end with one line for any options, settings, config.json and checkpoints.

They do not end with a traceback, by a signal, after hours or out of memory. Every case is drawn at
random from inputs that often break programs. GANKERNELS_FUZZ=10000 tries as many cases, with
another seed every time.
"""

import copy
import json
import os
import random
import string
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from gankernels import games
from gankernels.train import start

sys.path.insert(0, str(Path(__file__).parent / "train"))
import children

CASES = int(os.environ.get("GANKERNELS_FUZZ", "160"))
SEED = random.SystemRandom().randrange(2**32) if "GANKERNELS_FUZZ" in os.environ else 0

NUMBERS = ["0", "-1", "-0", "1", "2", "7", "1e12", "1e400", "1e-320", "1e39", "1e300", "nan", "inf"]
NUMBERS += ["-inf", "1e5", "3.5", *(str(2**n) for n in (31, 40, 62, 63, 64, 70)), "9" * 5000]
TEXTS = ["", " ", "None", "none", "True", "false", "٣", "½", "0x10", "1_0", "a\0b", "x" * 5000]
TEXTS += [
    "\udcff",
    "a\nb",
    "1,2",
    "1,99999999999",
    "-1,5",
    "5,",
    "{}",
    "meta",
    "cuda",
    "cpu:5",
    "mps",
]
TEXTS += [
    "privateuseone",
    "cuda:-1",
    "bf16",
    "fp64",
    "dragan",
    "wgan-gp",
    "../nowhere",
    "~nobody/x",
]
JSON = [None, True, False, 0, -1, 1, 2, 1e300, 2**64, 10**100, "", "x", [], [1], {}, {"a": [{}]}]
SETTINGS = ["size=8", "sample_every=0", "steps=1", "batch_size=4", "width=1", "latent_dim=3"]
OPTIONS = {
    "train": ["data", "steps", "batch-size", "precision", "device", "penalty", "penalty-weight",
              "penalty-every", "minibatch-discrimination"],
    "sample": ["out", "format", "count", "labels", "seed", "interpolate", "columns", "truncation",
               "batch-size", "device"],
    "evaluate": ["count", "seed", "device", "json", "metrics"],
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a tiny game."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = dict(setting.split("=") for setting in SETTINGS)
    trainer = start("cdcgan", device="cpu", out=str(run), **settings)
    trainer.iterate()
    trainer.save()
    from gankernels.train.config import to_dict

    config = to_dict("cdcgan", trainer.config, trainer.game.options)
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths at which there is something else than what a command looks for."""
    folder = tmp_path_factory.mktemp("places")
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.json")
    (folder / "file").write_bytes(b"\x80\x02]" * 9)
    (folder / "loop").symlink_to("loop")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "zero.json").symlink_to("/dev/zero")
    for name, target in (("of_fifo", "../../fifo"), ("of_zero", "/dev/zero"), ("of_loop", "loop")):
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "checkpoints" / "step_00000001.pt").symlink_to(target)
    return [str(path) for path in folder.iterdir()] + [str(folder), "/dev/null", "/dev/zero"]


class Maker:
    """Cases, and the files that they name."""

    def __init__(self, rng, folder, trained, places):
        self.rng, self.folder, self.places = rng, folder, places
        self.run, self.number = trained, 0
        (self.checkpoint,) = (trained / "checkpoints").glob("*.pt")
        self.content = torch.load(self.checkpoint, weights_only=True)
        self.config = json.loads((trained / "config.json").read_text())

    def new(self, name):
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        return folder / name

    def value(self):
        return self.rng.choice(self.rng.choice([NUMBERS, NUMBERS, TEXTS, self.places]))

    def options(self):
        command = self.rng.choice(["train", "train", "sample", "evaluate"])
        names = self.rng.sample(OPTIONS[command], self.rng.randint(1, 2))
        hostile = [f"--{name}={self.value()}" for name in names]
        if command == "sample":
            return [command, str(self.run), f"--out={self.new('grid.png')}", *hostile]
        if command == "evaluate":
            source = self.rng.choice([str(self.run), *self.places])
            return [command, source, "--data=nowhere", *hostile]
        model = self.rng.choice(games.names())
        return [*self.train(model, "--out", str(self.new("run"))), *hostile]

    def train(self, model, *more):
        known = (
            {"width"} & vars(games.get(model).Options()).keys() if model in games.names() else {}
        )
        settings = [s for s in SETTINGS if s.split("=")[0] != "width" or known]
        return ["train", model, "--device=cpu", *more, *(f"--set={s}" for s in settings)]

    def settings(self):
        model = self.rng.choice(games.names())
        names = [*self.config, *vars(games.get(model).Options()), "zzz", ""]
        names = [name for name in names if name not in ("out", "steps")]
        hostile = [f"--set={self.rng.choice(names)}={self.value()}"]
        return [*self.train(model, "--out", str(self.new("run"))), *hostile]

    def sources(self):
        place = self.rng.choice([*self.places, *TEXTS, str(self.run)])
        return self.rng.choice([
            ["sample", place, f"--out={self.new('grid.png')}"],
            self.train(place, "--out", str(self.new("run"))),
            self.train("cdcgan", "--resume", "--out", place),
            self.train("cdcgan", "--out", str(self.new("run")), "--data", place),
        ])  # fmt: skip

    def json(self):
        config = dict(self.config)
        for name in self.rng.sample(list(config), self.rng.randint(1, 2)):
            if name == "steps" or self.rng.random() < 0.3:
                del config[name]
            else:
                config[name] = self.rng.choice([*JSON, self.value()])
        text = json.dumps(config)
        form = self.rng.randrange(8)
        if form == 0:
            text = "[" * 100_000
        elif form == 1:
            text = text[: self.rng.randrange(len(text))]
        elif form == 2:
            text = text.replace("1", self.rng.choice(["1e400", "NaN", "9" * 5000, "\\ud800"]), 1)
        elif form == 3:
            text = json.dumps(self.rng.choice(JSON))
        code = self.rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"])
        path = self.new("config.json")
        path.write_bytes(text.encode(code))
        if self.rng.random() < 0.3:
            return ["train", "cdcgan", "--device=cpu", "--resume", f"--out={path.parent}"]
        return ["train", str(path), "--device=cpu", f"--out={self.new('run')}"]

    def use(self, path):
        """A command that reads the checkpoint in a run folder."""
        if self.rng.random() < 0.5:
            return ["sample", str(path), f"--out={self.new('grid.png')}", "--count=2"]
        run = path.parent.parent
        (run / "config.json").write_text(json.dumps(self.config))
        return self.train("cdcgan", "--resume", f"--out={run}", "--set=steps=2")

    def archive(self):
        path = self.new("checkpoints") / "step_00000001.pt"
        path.parent.mkdir()
        whole = bytearray(self.checkpoint.read_bytes())
        form = self.rng.randrange(5)
        if form == 0:
            del whole[self.rng.randrange(len(whole)) :]
        elif form == 1:
            for _ in range(self.rng.choice([1, 10, 1000])):
                whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
        elif form == 2:  # the directory, at the end, says how large everything is
            for _ in range(20):
                whole[-self.rng.randrange(1, min(4000, len(whole)))] = self.rng.choice([0, 255])
        path.write_bytes(whole)
        if form >= 3:
            self.repack(path, compress=form == 3)
        return self.use(path)

    def repack(self, path, compress):
        """The same archive with other bytes in its pickle, and perhaps compressed."""
        with zipfile.ZipFile(self.checkpoint) as old, zipfile.ZipFile(path, "w") as new:
            for member in old.infolist():
                data = bytearray(old.read(member))
                if member.filename.endswith("data.pkl"):
                    for _ in range(self.rng.randint(1, 3)):
                        data[self.rng.randrange(len(data))] = self.rng.randrange(256)
                kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
                new.writestr(member.filename, bytes(data), kind)

    def content_of(self):
        content = copy.deepcopy(self.content)
        for _ in range(self.rng.choice([1, 1, 2])):
            self.damage(content)
        path = self.new("checkpoints") / "step_00000001.pt"
        path.parent.mkdir()
        torch.save(content, path)
        return self.use(path)

    def damage(self, node):
        """Replace, take away or add something, anywhere in nested mappings and sequences."""
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = self.rng.choice(keys)
            below = node[key]
            if isinstance(below, (dict, list)) and below and self.rng.random() < 0.8:
                node = below
                continue
            break
        if self.rng.random() < 0.2:
            del node[key]
        elif self.rng.random() < 0.1 and isinstance(node, dict):
            node[self.rng.choice(["a", 0, 99, ""])] = self.other(below)
        else:
            node[key] = self.other(below)

    def other(self, value):
        tensors = [
            torch.empty(0), torch.zeros(()), torch.zeros(3, 5), torch.zeros(7).double(),
            torch.full((2,), torch.nan), torch.zeros(2, 2).to_sparse(),
            torch.zeros(9, device="meta"), torch.zeros(1).expand(10**9),
            torch.zeros(3, dtype=torch.complex64), torch.zeros(4).bool(),
        ]  # fmt: skip
        if isinstance(value, torch.Tensor) and value.numel() < 10**6:
            tensors += [
                value[..., :0] if value.dim() else value.reshape(1), value.double(), value.half(),
                torch.full_like(value, torch.nan) if value.is_floating_point() else value + 1,
                value.new_zeros(()).expand(value.shape), value.new_zeros(()), value.unsqueeze(0),
                value.new_zeros(value.numel()), torch.full_like(value, -1),
            ]  # fmt: skip
        plain = [*JSON, float("nan"), float("inf"), -(2**62), 10**400, "cgan", "gan", bytearray(9)]
        plain += [(1, 2), torch.float32, torch.device("meta"), {1, 2}, "".join(string.printable)]
        return self.rng.choice(self.rng.choice([tensors, plain]))


def test_every_case_ends_in_one_line(tmp_path, trained, places):
    rng = random.Random(SEED)
    maker = Maker(rng, tmp_path, trained, places)
    kinds = [maker.options, maker.settings, maker.sources, maker.json, maker.archive]
    kinds += [maker.content_of] * 2
    cases = [rng.choice(kinds)() for _ in range(CASES)]
    results = tmp_path / "results"
    arguments = cases, str(tmp_path / "log"), str(results), 4 * 1024**3, 300
    children.serve()
    process = children.CONTEXT.Process(target=children.run_many, args=arguments)
    process.start()
    process.join()
    outcomes = [json.loads(line) for line in results.read_text().splitlines()]
    wrong = []
    for case, (status, printed) in zip(cases, outcomes, strict=False):
        lines = printed.splitlines()
        errors = [line for line in lines if line.startswith("gankernels: error: ")]
        one_line = errors == lines[-1:] if status else not errors
        if status not in (0, 1, 2) or not one_line or len(printed) > 3000:
            wrong.append(f"{case}\n{status}: {printed[-3000:]}")
    if len(outcomes) < len(cases):
        log = (tmp_path / "log").read_text(errors="replace")[-2000:]
        wrong.append(f"{cases[len(outcomes)]}\nended the process: {process.exitcode}\n{log}")
    assert not wrong, f"seed {SEED}, {len(wrong)} wrong:\n" + "\n\n".join(wrong[:20])
    statuses = [status for status, _ in outcomes]
    assert min(map(statuses.count, (0, 2))) > CASES / 20  # some work, so that others reach far
