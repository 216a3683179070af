"""Checkpoints as people name and store them."""

import pytest
import torch
from helpers.replays import replay
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.checkpoint_names import CheckpointName, compiled, of_stage, read_name
from svf_lightning.errors import CheckpointError, InputError
from svf_lightning.replay import FolderCheckpoints, HubCheckpoints, NanoGPTCheckpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step512", CheckpointName(512)),
        ("step_512", CheckpointName(512)),
        ("step512-tokens2B", CheckpointName(512, "", 2 * 10**9)),
        ("checkpoint-1000", CheckpointName(1000)),
        ("ckpt_100", CheckpointName(100)),
        ("iter_0001000", CheckpointName(1000)),
        ("global_step2000", CheckpointName(2000)),
        ("stage1-step1000-tokens5B", CheckpointName(1000, "stage1", 5 * 10**9)),
        ("stage2-ingredient1-step3000-tokens7B", CheckpointName(3000, "stage2-ingredient1", 7 * 10**9)),
        ("main", None),
        ("footstep5", None),
        ("optimizer", None),
    ],
)
def test_names_that_people_give_say_their_step(name, expected):
    assert read_name(name) == expected


def test_a_step_may_stand_inside_the_name_of_a_revision_and_not_of_a_folder():
    assert read_name("seed1-step8", loose=True) == CheckpointName(8)
    assert read_name("seed1-step8") is None


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("run-{step}", "run-0040", CheckpointName(40)),
        ("it{step}.tok{tokens}", "it40.tok1.5M", CheckpointName(40, "", 1_500_000)),
        (r"epoch\d+_(?P<step>\d+)", "epoch3_1200", CheckpointName(1200)),
        ("run-{step}", "step40", None),
    ],
)
def test_a_pattern_of_the_users_reads_other_names(pattern, name, expected):
    assert read_name(name, compiled(pattern)) == expected


@pytest.mark.parametrize("pattern", ["run", r"run-(\d+)", "run-(?P<step>"])
def test_a_pattern_without_a_step_is_refused(pattern):
    with pytest.raises(InputError, match=r"\{step\}"):
        compiled(pattern)


OLMO = ["main", "stage1-step0-tokens0B", "stage1-step1000-tokens5B", "stage2-ingredient1-step1000-tokens5B",
        "stage2-ingredient2-step1000-tokens5B"]  # fmt: skip


def test_stages_have_an_axis_each():
    assert list(of_stage(OLMO)) == ["stage1-step0-tokens0B", "stage1-step1000-tokens5B"]
    assert list(of_stage(OLMO, stage="stage2-ingredient2")) == ["stage2-ingredient2-step1000-tokens5B"]
    with pytest.raises(InputError, match="stage1, stage2-ingredient1, stage2-ingredient2"):
        of_stage(OLMO, stage="stage3")


def test_seeds_of_polypythias_are_one_subject():
    first, second = (HubCheckpoints(f"EleutherAI/pythia-160m-seed{seed}") for seed in (1, 2))
    assert first.subject() == second.subject() == HubCheckpoints("EleutherAI/pythia-160m").subject()
    assert first.identity() != second.identity()
    olmo = HubCheckpoints("allenai/OLMo-2-0425-1B", stage="stage1")
    assert olmo.subject()["stage"] == "stage1"


# ---- folders


@pytest.fixture
def renamed(suite, tmp_path):
    """The suite's checkpoints under other names."""

    def rename(**names):
        for step, name in names.items():
            (tmp_path / name).symlink_to(suite / step, target_is_directory=True)
        return tmp_path

    return rename


@pytest.mark.parametrize(
    ("names", "options", "steps", "tokens"),
    [
        ({"step0": "checkpoint-0", "step8": "checkpoint-500"}, {}, [0, 500], [None, None]),
        ({"step0": "ckpt_0", "step8": "ckpt_10"}, {}, [0, 10], [None, None]),
        ({"step0": "iter_0000000", "step8": "iter_0000010"}, {}, [0, 10], [None, None]),
        (
            {"step0": "stage1-step0-tokens0B", "step4": "stage1-step9-tokens3B", "step8": "stage2-step9-tokens4B"},
            {}, [0, 9], [0, 3 * 10**9],
        ),
        ({"step0": "stage1-step0", "step8": "stage2-step9-tokens4B"}, {"stage": "stage2"}, [9], [4 * 10**9]),
        ({"step0": "my-run.0", "step8": "my-run.7", "step4": "other"}, {"pattern": "my-run.{step}"}, [0, 7], [None] * 2),
    ],
)  # fmt: skip
def test_folders_are_found_by_their_names(renamed, names, options, steps, tokens):
    source = FolderCheckpoints(str(renamed(**names)), **options)
    assert [ref.step for ref in source.refs()] == steps
    assert [ref.tokens for ref in source.refs()] == tokens
    assert source.load(source.refs()[-1]).weight_hash


def test_an_output_folder_of_the_trainer_is_a_source(suite, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(suite / "step0")
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    Trainer(model=model, args=arguments, train_dataset=[row] * 8).train()
    AutoTokenizer.from_pretrained(suite / "step0").save_pretrained(tmp_path)
    source = FolderCheckpoints(str(tmp_path))
    assert [ref.name for ref in source.refs()] == ["checkpoint-2", "checkpoint-4"]
    assert source.load(source.refs()[0]).weight_hash != source.load(source.refs()[1]).weight_hash


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("global_step4/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
    ],
)
def test_weights_in_parts_are_refused_with_the_command_that_converts_them(suite, tmp_path, file, command):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "config.json").write_bytes((suite / "step0" / "config.json").read_bytes())
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"")
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=command):
        source.load(source.refs()[0])
    assert [ref.step for ref in FolderCheckpoints(str(folder)).refs()] == [4]  # global_step4 is no checkpoint


# ---- nanoGPT


class NanoGPT(torch.nn.Module):
    """The model of nanoGPT's model.py, written down from its description: pre-norm GPT-2 with exact GELU."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias):
        super().__init__()
        nn = torch.nn
        self.n_head = n_head

        def norm():
            return nn.LayerNorm(n_embd, bias=bias)

        def block():
            attn = nn.ModuleDict(
                {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)}
            )
            mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)}
            )
            return nn.ModuleDict({"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        F, t = torch.nn.functional, self.transformer
        x = t.wte(tokens) + t.wpe(torch.arange(tokens.shape[1]))
        for block in t.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block.attn.c_proj(y)
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(t.ln_f(x))


def nanogpt(path, n_vocabulary, *, bias, step=0, seed=0, prefix=""):
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 24, "block_size": 64, "vocab_size": n_vocabulary, "bias": bias}
    torch.manual_seed(seed)
    model = NanoGPT(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"model": state, "model_args": {**arguments, "dropout": 0.0}, "iter_num": step, "config": {"dataset": "x"},
         "best_val_loss": torch.tensor(1.0), "optimizer": {}},
        path,
    )  # fmt: skip
    return model


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_a_file_of_nanogpt_is_the_same_model(suite, tmp_path, bias, prefix):
    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    model = nanogpt(tmp_path / "ckpt.pt", len(tokenizer), bias=bias, prefix=prefix, step=250)
    source = NanoGPTCheckpoint(str(tmp_path / "ckpt.pt"), tokenizer=str(suite / "step0"))
    (ref,) = source.refs()
    assert ref.step == 250
    loaded = source.load(ref).model
    tokens = torch.randint(0, len(tokenizer), (2, 17))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    assert source.model_name() == "ckpt"
    assert source.identity() == {"kind": "nanogpt", "name": "ckpt.pt"}


def test_a_folder_of_nanogpt_files_is_a_training(suite, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    for step in (0, 100, 200):
        nanogpt(tmp_path / f"ckpt_{step}.pt", len(tokenizer), bias=False, step=step, seed=step)
    source = NanoGPTCheckpoint(str(tmp_path), tokenizer=str(suite / "step0"), steps=[0, 200])
    rows = replay(source, tmp_path / "run")
    assert rows["step"].values.tolist() == [0, 200]
    assert len(set(rows["weight_hash"].values.tolist())) == 2


@pytest.mark.parametrize("content", [b"", b"no pickle", {"weights": 1}, {"model": {}, "model_args": {}}])
def test_a_file_that_is_none_of_nanogpts_says_so(suite, tmp_path, content):
    path = tmp_path / "ckpt.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    source = NanoGPTCheckpoint(str(path), tokenizer=str(suite / "step0"))
    with pytest.raises((InputError, CheckpointError), match=r"ckpt\.pt"):
        source.load(source.refs()[0])


@pytest.mark.parametrize("change", [{"n_embd": 26}, {"n_head": 5}, {"vocab_size": 9}])
def test_arguments_of_nanogpt_that_do_not_fit_its_weights_are_one_line(suite, tmp_path, change):
    path = tmp_path / "ckpt.pt"
    nanogpt(path, 222, bias=True)
    stored = torch.load(path)
    torch.save({**stored, "model_args": stored["model_args"] | change}, path)
    source = NanoGPTCheckpoint(str(path), tokenizer=str(suite / "step0"))
    with pytest.raises(CheckpointError, match=r"ckpt\.pt is no GPT of nanoGPT") as error:
        source.load(source.refs()[0])
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_of_nanogpt_names_the_option(suite, tmp_path):
    nanogpt(tmp_path / "ckpt.pt", 222, bias=True)
    with pytest.raises(InputError, match=r"--data\.source\.init_args\.tokenizer"):
        NanoGPTCheckpoint(str(tmp_path / "ckpt.pt"), tokenizer=str(tmp_path)).tokenizer()


# ---- what is computed in


def test_weights_stored_in_half_precision_are_computed_with_in_float64(suite, tmp_path):
    from svf_lightning.replay import CheckpointReplay

    model = AutoModelForCausalLM.from_pretrained(suite / "step8", dtype=torch.float16)
    model.save_pretrained(tmp_path / "half" / "step8")
    AutoTokenizer.from_pretrained(suite / "step0").save_pretrained(tmp_path / "half")
    rows = {
        dtype: replay(FolderCheckpoints(str(tmp_path / "half")), tmp_path / dtype, model=CheckpointReplay(dtype=dtype))
        for dtype in ("float32", "float64")
    }
    assert float(rows["float64"]["sad/score_error"].max()) < 1e-7  # keys and queries are compared in float32 at least
    torch.testing.assert_close(
        torch.tensor(rows["float64"]["sad/sparseness"].values, dtype=torch.float32),
        torch.tensor(rows["float32"]["sad/sparseness"].values, dtype=torch.float32), rtol=1e-3, atol=1e-4,
    )  # fmt: skip
