"""Both parties' acts on every family, and what neither may see or lose."""

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from blindtune.errors import ConfigError, DataError, MismatchError, OutputError, PackageError
from blindtune.evaluation.utility.evaluating import EvaluationConfig, evaluate
from blindtune.exchange.packages.manifest import AdapterLayer, FullModelFacts
from blindtune.exchange.packages.package import open_package
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model
from blindtune.models.surgery import keep_layers
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.emulator import adapter_parameters, open_emulator, write_emulator
from blindtune.offsite.model_owner.emulation import (
    EmulatorConfig,
    emulate,
    replaced_layers,
    uniform_choice,
)
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.offsite.model_owner.study import open_study
from blindtune.offsite.model_owner.studying import study
from offsite_world import (
    READING,
    SILENT,
    TRIPLET,
    owners_world,
    save_text,
    save_tiny,
    study_tiny,
    tune_tiny,
)
from tiny_models import FAMILY_NAMES, tiny_model


def logits(model, length=10):
    with torch.no_grad():
        return model(torch.arange(length)[None] + 3).logits


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_from_study_to_plug_in(name, tmp_path):
    made = owners_world(tmp_path, name)
    for adapter in ("adapter", "lora"):
        result = plug_in(tmp_path / "model", tmp_path / adapter, tmp_path / f"tuned-{adapter}")
        last = made.study.layer_count - 1
        assert set(result.relative_change) == {0, last}
        assert all(0 < change < 0.5 for change in result.relative_change.values())
    half = tune_tiny(tmp_path, "half", run=replace(SILENT, precision="bfloat16"))
    losses = [[loss for _, loss in run.training.train_loss] for run in (half, made.full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    opened = open_emulator(tmp_path / "emulator")
    start = torch.arange(6)[None] + 3
    cached = opened.model.generate(start, max_new_tokens=6, do_sample=False, use_cache=True)
    plain = opened.model.generate(start, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_the_opened_emulator_is_the_one_that_was_made(world):
    """Package and surgery agree to the bit."""
    from blindtune.offsite.model_owner.emulation import reshape

    model = load_model(world.path / "model")
    config = TRIPLET
    reshape(model, world.study, replaced_layers(world.study, config), config)
    opened = open_emulator(world.path / "emulator")
    assert torch.equal(logits(model), logits(opened.model))
    assert opened.model.num_parameters() == world.emulation.parameters
    assert world.emulation.parameters < world.emulation.full_parameters
    trainable = {n for n, p in opened.model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(list(adapter_parameters(opened.model, opened.adapter_indices)))


def test_plug_in_puts_back_exactly_the_adapter(world, tmp_path):
    plug_in(world.path / "model", world.path / "adapter", tmp_path / "tuned")
    tuned, before = load_model(tmp_path / "tuned"), load_model(world.path / "model")
    tuned_emulator = world.full.emulator
    expected = dict(adapter_parameters(tuned_emulator.model, tuned_emulator.adapter_indices))
    layers = Decoder(tuned).layers
    for (name, new), old in zip(tuned.named_parameters(), before.parameters(), strict=True):
        key = name.removeprefix("model.")
        if key in expected:
            assert torch.equal(new, expected[key])
            assert not torch.equal(new, old)
        else:
            assert torch.equal(new, old), name
    assert len(layers) == 8


def test_lora_plug_in_equals_peft(world, tmp_path):
    """Merging by hand gives what PEFT computes on the emulator's own adapter layers."""
    result = plug_in(world.path / "model", world.path / "lora", None)
    wrapped = world.lora.emulator.model
    merged, peft = Decoder(result.model).layers[0], Decoder(wrapped).layers[0]
    x = torch.randn(2, 5, 32)
    for path in ("self_attn.q_proj", "mlp.gate_proj"):
        torch.testing.assert_close(
            merged.get_submodule(path)(x), peft.get_submodule(path)(x), atol=1e-5, rtol=1e-4
        )


def test_plain_transformers_opens_the_result_without_this_project(world, tmp_path):
    plug_in(world.path / "model", world.path / "adapter", tmp_path / "tuned")
    program = (
        "import sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'blindtune': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Wall())\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('abc', return_tensors='pt').input_ids\n"
        "print(model(ids).logits.shape[1])\n"
        "assert 'blindtune' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tuned")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) >= 1


def test_tuning_needs_neither_model_nor_study(world, tmp_path):
    for name in ("emulator", "private.txt"):
        source = world.path / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    program = (
        "import sys, pathlib, builtins\n"
        "root, hidden = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "def audit(event, args):\n"
        "    if event == 'open' and str(args[0]).startswith(hidden): raise RuntimeError(args[0])\n"
        "sys.addaudithook(audit)\n"
        "from blindtune.offsite.data_owner.tuning import tune\n"
        "from blindtune.training.loop import RunConfig, TrainingConfig\n"
        "from blindtune.training.text import DataConfig\n"
        "done = tune(root / 'emulator', root / 'private.txt', root / 'adapter',\n"
        "     training=TrainingConfig(max_steps=3, learning_rate=1e-3),\n"
        "     reading=DataConfig(max_length=32, max_tokens=2000), run=RunConfig(silent=True))\n"
        "assert 'blindtune.offsite.model_owner.study' not in sys.modules\n"
        "assert 'blindtune.offsite.model_owner.plugin' not in sys.modules\n"
        "print(done.adapter_id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(world.path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = tune_tiny(world.path, "adapter-again")
    assert done.stdout.strip() == again.adapter_id == world.full.adapter_id


def test_a_package_tells_nothing_of_the_study(world):
    text = (world.path / "emulator" / "manifest.json").read_text()
    assert str(world.path) not in text
    assert "tmp" not in text
    plain = json.loads(text)
    assert {"scores", "damage", "history", "seconds"} & set(plain) == set()
    scores = [f"{s:.6f}"[:7] for s in world.study.scores_M.tolist()]
    everything = b"".join(p.read_bytes() for p in (world.path / "emulator").iterdir())
    for word in (str(world.path).encode(), b"calibrat", *(s.encode() for s in scores)):
        assert word not in everything, word
    header = open_package(world.path / "emulator", "emulator").header
    assert not any("score" in name or "moment" in name for name in header)
    assert "_name_or_path" not in text


def test_many_triplets_from_one_study(world, tmp_path):
    sizes = {}
    for alpha in (0.0, 0.4):
        for beta in (0.0, 0.9):
            config = replace(TRIPLET, adapter_layers=2, alpha=alpha, beta=beta)
            made = emulate(world.path / "study", tmp_path / f"{alpha}-{beta}", config)
            sizes[alpha, beta] = made.parameters
    assert sizes[0.4, 0.9] < sizes[0.4, 0.0] < sizes[0.0, 0.0] == world.emulation.full_parameters
    assert sizes[0.0, 0.9] < sizes[0.0, 0.0]
    model = open_emulator(tmp_path / "0.0-0.0").model
    assert torch.equal(logits(model), logits(load_model(world.path / "model")))


def test_layer_drop_makes_a_shorter_plain_model(tmp_path):
    save_tiny("gemma2", tmp_path / "model")
    save_text(tmp_path)
    from blindtune.offsite.model_owner.study import StudyConfig
    from blindtune.offsite.model_owner.studying import study

    study(
        tmp_path / "model", tmp_path / "public.txt", tmp_path / "study",
        StudyConfig(stand_in="identity", warm_start="none", max_length=32,
                    calibration_tokens=512, damage_tokens=256),
        DynamicConfig(steps=0),
    )  # fmt: skip
    for choice in ("scores", "uniform"):
        config = EmulatorConfig(
            adapter_layers=1, alpha=0.5, beta=1.0, weighted=False, choice=choice
        )
        made = emulate(tmp_path / "study", tmp_path / choice, config)
        opened = open_emulator(tmp_path / choice)
        assert len(made.layers) == opened.model.config.num_hidden_layers == 5
        assert {type(layer).__name__ for layer in Decoder(opened.model).layers} == {
            "Gemma2DecoderLayer"
        }


@pytest.mark.parametrize(("candidates", "batches"), [(0, 1), (3, 2)])
def test_a_study_counts_the_tokens_of_all_its_steps(tmp_path, candidates, batches):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    made = study_tiny(tmp_path, DynamicConfig(steps=2, batch_size=2, candidates=candidates))
    assert made.tokens["learn"] == batches * 2 * 2 * 32  # steps, windows, their length


def test_layers_are_not_chosen_by_scores_that_were_never_made(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    made = study_tiny(tmp_path, DynamicConfig(steps=1, batch_size=2), initial_scores="zero")
    with pytest.raises(ConfigError, match="with initial scores greedy or with candidates"):
        replaced_layers(made, EmulatorConfig(adapter_layers=1, alpha=0.5))
    assert replaced_layers(made, EmulatorConfig(adapter_layers=1, alpha=0.5, choice="uniform"))
    assert replaced_layers(made, EmulatorConfig(adapter_layers=1, alpha=0.0)) == ()


def test_too_few_tokens_to_calibrate_on_are_told_where_they_are_needed(tmp_path):
    save_tiny("llama", tmp_path / "model")  # 32 wide
    save_text(tmp_path)
    few = {"max_length": 9, "damage_tokens": 9, "calibration_tokens": 18}
    none = DynamicConfig(steps=0)
    with pytest.raises(DataError, match=r"at least 32 .*, got 18: .*--calibration-tokens 36"):
        study_tiny(tmp_path, none, **few)
    (tmp_path / "public.txt").write_text("the cat sat on the mat and saw the dog")
    with pytest.raises(DataError, match=r"at least 32 .*, got 18: give more public text"):
        study_tiny(tmp_path, none, **few)
    made = study_tiny(tmp_path, none, warm_start="none", initial_scores="zero", **few)
    assert "calibrate" not in made.tokens


def test_one_middle_layer_cannot_be_half_replaced(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    model = load_model(tmp_path / "model")
    keep_layers(model, range(5))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="at least two middle layers"):
        study_tiny(tmp_path, DynamicConfig(steps=1, practice="half"), min_adapter_layers=2)


def test_uniform_choice_is_the_formula_of_offsite_tuning():
    assert sorted(uniform_choice(44, 16))[:4] == [0, 3, 6, 9]
    assert len(uniform_choice(44, 16)) == 16
    assert len(uniform_choice(26, 19)) == 19
    assert uniform_choice(20, 1) == {10}


def test_study_resumes_to_the_same_result(tmp_path, monkeypatch):
    from blindtune.offsite.model_owner import studying

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_tiny("llama", tmp_path / name / "model")
        save_text(tmp_path / name)
    dynamic = DynamicConfig(steps=7, batch_size=2, learning_rate=1e-2, groups=1)
    monkeypatch.setattr(studying, "SAVE_EVERY", 2)
    undisturbed = study_tiny(tmp_path / "a", dynamic)
    for stage in ("calibrated", "measured", "learning"):
        save = studying.WorkDirectory.save

        def dying(self, study, name, state=None, stage=stage, save=save):
            save(self, study, name, state)
            if name == stage:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(studying.WorkDirectory, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                study_tiny(tmp_path / "b", dynamic)
        assert not (tmp_path / "b" / "study").exists()
    resumed = study_tiny(tmp_path / "b", dynamic)
    assert torch.equal(undisturbed.scores_M, resumed.scores_M)
    for a, b in zip(
        undisturbed.stand_ins.parameters(), resumed.stand_ins.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert [h["step"] for h in resumed.history] == list(range(1, 8))
    assert not (tmp_path / "b" / "study.work").exists()
    reread = open_study(tmp_path / "b" / "study")
    assert torch.equal(reread.scores_M, resumed.scores_M)
    assert reread.config == resumed.config


def test_second_moments_wait_on_the_disk_while_layers_are_measured(tmp_path, monkeypatch):
    import gc

    from blindtune.offsite.model_owner import studying

    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    calibrated, alive = [], []

    def calibrate(*arguments, **options):
        found = calibrated_by(*arguments, **options)
        calibrated.extend({p: m.clone() for p, m in kept.items()} for kept in found.second_moments)
        alive.extend(weakref.ref(m) for kept in found.second_moments for m in kept.values())
        return found

    def measure(*arguments):
        gc.collect()
        assert not any(moment() is not None for moment in alive)
        return measured_by(*arguments)

    calibrated_by, measured_by = studying.calibrate, studying.measured_damage
    monkeypatch.setattr(studying, "calibrate", calibrate)
    monkeypatch.setattr(studying, "measured_damage", measure)
    made = study_tiny(tmp_path)
    assert alive
    for found in (made, open_study(tmp_path / "study")):
        for kept, original in zip(found.second_moments, calibrated, strict=True):
            assert kept.keys() == original.keys()
            assert all(torch.equal(kept[path], original[path]) for path in kept)


def test_a_half_written_stage_is_not_in_the_way(tmp_path):
    """What kill -9 leaves while a stage is being written."""
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    half = tmp_path / "study.work" / ".learning.0a1b2c3d.partial"
    half.mkdir(parents=True)
    (half / "study.json").write_text("{")
    study_tiny(tmp_path)
    assert open_study(tmp_path / "study").second_moments
    assert not (tmp_path / "study.work").exists()


def test_an_interrupted_study_with_other_options_is_not_continued(tmp_path, monkeypatch):
    from blindtune.offsite.model_owner import studying

    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(studying, "measured_damage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study_tiny(tmp_path)
    with pytest.raises(ConfigError, match="other options"):
        study_tiny(tmp_path, DynamicConfig(steps=1))


def test_plug_in_refuses_another_model(world, tmp_path):
    other = tiny_model("llama", seed=1)
    save_tiny("llama", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="fingerprint"):
        plug_in(tmp_path / "other", world.path / "adapter", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_plug_in_refuses_unknown_missing_misshapen_and_not_finite(world, tmp_path):
    from blindtune.exchange.packages.writing import write_package

    package = open_package(world.path / "adapter", "adapter")
    expected = {n: (f.shape, f.dtype) for n, f in package.header.items()}
    tensors = package.read_tensors(expected)
    name = "layers.0.self_attn.q_proj.weight"
    cases = {
        "unknown": tensors | {"layers.3.mlp.up_proj.weight": torch.ones(2, 2)},
        "missing": {n: t for n, t in tensors.items() if n != name},
        "misshapen": tensors | {name: tensors[name][:-1].clone()},
        "head": tensors | {"lm_head.weight": torch.ones(2, 2)},
    }
    for case, changed in cases.items():
        write_package(tmp_path / case, package.manifest, changed, {})
        with pytest.raises(MismatchError):
            plug_in(world.path / "model", tmp_path / case, tmp_path / "tuned")
    shutil.copytree(world.path / "adapter", tmp_path / "nan")
    _poison(tmp_path / "nan", package, tensors, name)
    with pytest.raises(PackageError, match=r"finite|NaN"):
        plug_in(world.path / "model", tmp_path / "nan", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def _poison(directory, package, tensors, name):
    """A package whose hashes are right and whose weights hold a NaN: only a forger makes one."""
    import hashlib

    from safetensors.torch import save

    poisoned = tensors | {name: tensors[name].clone()}
    poisoned[name][0, 0] = float("nan")
    (directory / "weights.safetensors").write_bytes(save(poisoned))
    manifest = json.loads((directory / "manifest.json").read_text())
    content = (directory / "weights.safetensors").read_bytes()
    manifest["files"]["weights.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (directory / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.0}, "kept middle layer"),
        ({"adapter_layers": 4}, "kept middle layer"),
        ({"adapter_layers": 0}, "adapter_layers >= 1"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"beta": -0.1}, "from 0 to 1"),
        ({"reading": "half"}, "removed, kept"),
        ({"feed_forward": True}, "feed-forward moments"),
    ],
)
def test_bad_triplets_are_refused(world, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        emulate(world.path / "study", tmp_path / "emulator", EmulatorConfig(**options))
    assert not (tmp_path / "emulator").exists()


def test_evaluate_sees_emulator_adapter_and_plug_in(world, tmp_path):
    config = EvaluationConfig(max_length=32, max_tokens=320)
    data = world.path / "private.txt"

    def score(model, adapter=None):
        return evaluate(model, adapter=adapter, data=data, config=config).perplexity

    before = score(world.path / "emulator")
    after = score(world.path / "emulator", world.path / "adapter")
    assert after.nats_per_token < before.nats_per_token
    assert before.tokens == after.tokens == 310
    plug_in(world.path / "model", world.path / "adapter", tmp_path / "tuned")
    in_memory = score(world.path / "model", world.path / "adapter")
    written = score(tmp_path / "tuned")
    assert in_memory.nats_per_token == pytest.approx(written.nats_per_token, abs=1e-6)
    with pytest.raises(ConfigError, match="something to score"):
        evaluate(world.path / "model")


def test_the_emulator_works_with_trainer_peft_and_checkpointing(world, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    opened = open_emulator(world.path / "emulator")
    opened.model.activation_checkpointing_enable()
    wrapped = get_peft_model(opened.model, LoraConfig(r=2, target_modules=["up_proj"]))
    rows = [{"input_ids": torch.arange(8) + 3, "labels": torch.arange(8) + 3}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    result = Trainer(model=wrapped, args=arguments, train_dataset=rows).train()
    assert result.global_step == 2
    assert result.training_loss > 0


def test_an_emulator_in_half_precision_opens(world, tmp_path):
    config = EmulatorConfig(adapter_layers=1, dtype="bfloat16")
    emulate(world.path / "study", tmp_path / "half", config)
    emulate(world.path / "study", tmp_path / "whole", EmulatorConfig(adapter_layers=1))
    half = open_emulator(tmp_path / "half")
    assert half.model.dtype == torch.bfloat16
    whole = open_emulator(tmp_path / "whole").model
    close = open_emulator(tmp_path / "half", dtype=torch.float32).model
    torch.testing.assert_close(logits(close), logits(whole), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_a_model_in_half_precision_is_the_one_that_transformers_opens(name, tmp_path):
    """Weights are rounded; what rotary embeddings and embedding scales are made of is not."""
    made = owners_world(tmp_path, name)
    long = torch.arange(90)[None] + 3
    plugged = plug_in(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plugged.model.dtype == plain.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(plugged.model(long).logits, plain(long).logits)
    whole = [AdapterLayer()] * made.study.layer_count
    tokenizer = made.full.emulator.tokenizer
    facts = {"model_fingerprint": "0" * 64, "adapter_layers": 4}
    facts["full_model"] = FullModelFacts(parameters=10**6, bytes=10**6, layers=8)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for kept, told in product(dtypes, dtypes):
        model = load_model(tmp_path / "out")  # weights that bfloat16 holds
        write_emulator(
            model, tokenizer, whole, tmp_path / kept, dtype=kept, overwrite=True, **facts
        )
        emulator = open_emulator(tmp_path / kept, dtype=dtypes[told]).model
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtypes[told])
        assert emulator.dtype == emulator.config.dtype == dtypes[told]
        with torch.no_grad():
            assert torch.equal(emulator(long).logits, wanted(long).logits)


def test_plug_in_checks_before_it_writes_over(world, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "precious").write_text("keep me")
    with pytest.raises(OutputError, match="something is there"):
        plug_in(world.path / "model", world.path / "adapter", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "precious").read_text() == "keep me"


def test_no_act_replaces_what_it_reads(world, tmp_path):
    """The owner's only model was replaced by the tuned one, an emulator by an adapter."""
    made = world.path
    for name in ("model", "emulator", "adapter", "study"):
        shutil.copytree(made / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model, emulator, adapter, study_of = (
        tmp_path / name for name in ("model", "emulator", "adapter", "study")
    )
    public, private = made / "public.txt", made / "private.txt"
    for act, arguments, said in (
        (plug_in, (model, adapter, model), "apart from what is read"),
        (tune, (emulator, private, emulator), "apart from what is read"),
        (emulate, (study_of, model), "only an earlier package|expected an earlier result"),
        (emulate, (world.study, emulator / ".." / "adapter"), "kind emulator to replace"),
        (tune, (made / "emulator", private, emulator), "kind adapter to replace, got emulator"),
        (study, (model, public, model), "apart from what is read"),
    ):
        with pytest.raises(OutputError, match=said):
            act(*arguments, overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_generation_ends_where_the_models_own_does(world, tmp_path):
    model = shutil.copytree(world.path / "model", tmp_path / "model")
    settings = model / "generation_config.json"
    for ends in ([2, 5], 5):
        settings.write_text(json.dumps({"eos_token_id": ends}))
        study = replace(world.study, model=str(model))
        emulate(study, tmp_path / "emulator", TRIPLET, overwrite=True)
        assert open_emulator(tmp_path / "emulator").model.generation_config.eos_token_id == ends
    settings.write_text(json.dumps({"eos_token_id": [2, 500]}))  # 500 is no token
    made = emulate(study, tmp_path / "emulator", TRIPLET, overwrite=True)
    assert made.id == world.emulation.id
    settings.write_text(json.dumps({"eos_token_id": [2, 5]}))
    plug_in(model, world.path / "adapter", tmp_path / "tuned")
    kept = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [2, 5]


def test_tuning_reports_what_it_did(world):
    assert world.full.training.steps == 3
    assert world.full.training.tokens == 3 * 8 * READING.max_length
    assert "trained tokens" in world.full.sample
    assert world.lora.trained_parameters < world.full.trained_parameters
