"""Token classification, answer spans and step rewards against transformers: loss and every gradient on the same batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.config import Loader  # noqa: E402
from ftjax.data.formats import type_rows  # noqa: E402
from ftjax.data.rows import Row  # noqa: E402
from ftjax.data.spans import SpanBatch, encode_questions, type_questions  # noqa: E402
from ftjax.data.steps import encode_steps  # noqa: E402
from ftjax.data.tags import IGNORED, TagExamples  # noqa: E402
from ftjax.data.tokenizer import load_tokenizer  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.sources import embedded_folder  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.objectives.process_reward import ProcessReward  # noqa: E402
from ftjax.objectives.question_answering import QuestionAnswering  # noqa: E402
from ftjax.objectives.token_classification import TokenClassification  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=40, attn_implementation="eager",
)  # fmt: skip
LLAMA = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, attn_implementation="eager",
)  # fmt: skip
LENGTHS = (17, 6, 11)


def torch_model(folder, name, head, sizes, **changes):
    """A tiny random model with every parameter drawn, saved to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(2)
    model = getattr(transformers, f"{name}For{head}")(
        getattr(transformers, f"{name}Config")(**(sizes | changes))
    ).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if n.endswith("orm.weight") else 0.0))
    model.save_pretrained(folder)
    return model


def ours(objective, model, params, batch):
    """(loss, gradients, output) of our objective on a batch."""
    batch = jax.tree.map(jnp.asarray, batch)
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}
    weights, coef = objective.weights(batch), objective.coefficients()

    def loss(p):
        out = objective(lambda x, m: (model.apply(p, x), m), batch, reference=None, mutable={}, hyper=hyper)
        return sum(coef[k] * v / weights[k] for k, v in out.sums.items()), out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), grads, out


def same_gradients(model, grads, theirs):
    """Every parameter's gradient, over the largest entry of the tensor."""
    named = dict(theirs.named_parameters())
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    count = 0
    for name, g in to_file_tensors(model.table, grads):
        want = named[name].grad.numpy()
        assert np.abs(g - want).max() <= 1e-3 * np.abs(want).max() + noise, name
        count += 1
    assert count == sum(p.grad is not None for p in named.values())


def tagged(classes, seed=0):
    """(examples, batch, what transformers gets of it) with about half of the tokens labelled."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in LENGTHS:
        tags = np.where(rng.random(n) < 0.5, rng.integers(0, classes, n), IGNORED)
        parts.append((rng.integers(5, 97, n), rng.integers(0, 2, n), tags))
    names = tuple(f"c{i}" for i in range(classes))
    examples = TagExamples.of(parts, range(len(parts)), names, map(str, range(len(parts))))
    batch = examples.build([[0], [1], [2]], max(LENGTHS))
    labels = np.where(batch.weights > 0, batch.labels, IGNORED)
    theirs = {"input_ids": batch.tokens, "attention_mask": (batch.segments == 0).astype(int), "labels": labels}
    return examples, batch, {k: torch.tensor(np.asarray(v), dtype=torch.long) for k, v in theirs.items()}


@pytest.mark.parametrize("name, sizes", [("Bert", SIZES), ("Llama", LLAMA)])
def test_token_classification(tmp_path, name, sizes):
    theirs = torch_model(tmp_path, name, "TokenClassification", sizes, num_labels=4)
    model, params = hf.load(str(tmp_path))
    _, batch, inputs = tagged(4)
    if name == "Bert":
        inputs["token_type_ids"] = torch.tensor(batch.types, dtype=torch.long)
    out = theirs(**inputs)
    out.loss.backward()
    value, grads, mine = ours(TokenClassification(), model, params, batch)
    assert value == pytest.approx(float(out.loss.detach()), rel=1e-5)
    same_gradients(model, grads, theirs)
    right = (out.logits.argmax(-1) == inputs["labels"])[inputs["labels"] != IGNORED].float().mean()
    hits, count = mine.metrics["accuracy"]
    assert float(hits / count) == pytest.approx(float(right))


def test_token_classification_with_smoothing(tmp_path):
    """As the Trainer's label smoother has it."""
    theirs = torch_model(tmp_path, "Bert", "TokenClassification", SIZES, num_labels=4)
    model, params = hf.load(str(tmp_path))
    _, batch, inputs = tagged(4)
    out = theirs(**inputs, token_type_ids=torch.tensor(batch.types, dtype=torch.long))
    want = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)(out, inputs["labels"])
    want.backward()
    value, grads, _ = ours(TokenClassification(label_smoothing=0.2), model, params, batch)
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    same_gradients(model, grads, theirs)


STEPS = [
    {"prompt": "def add(a, b):", "completions": ["take a", "add b to it", "return"], "labels": [True, False, True]},
    {"prompt": "import", "completions": ["os"], "labels": [False]},
]


def test_process_reward(tmp_path):
    """What TRL's PRM trainer does: two labels at the ends of the steps, transformers' loss."""
    theirs = torch_model(tmp_path, "Llama", "TokenClassification", LLAMA, num_labels=2, vocab_size=4096)
    model, params = hf.load(str(tmp_path))
    tokenizer, objective = load_tokenizer(embedded_folder()), ProcessReward(step_separator=" ;")
    typed = type_rows([Row(x, f"x:{i}") for i, x in enumerate(STEPS)])
    examples = encode_steps(typed, tokenizer, Loader(max_length=32), **objective.data_options()).examples
    batch = examples.build([[0], [1]], 32)
    # the rows by transformers' own means
    own = transformers.AutoTokenizer.from_pretrained(str(embedded_folder()))
    own.pad_token = own.pad_token or own.eos_token
    features = []
    for row in STEPS:
        ids = [own.bos_token_id, *own.encode(row["prompt"], add_special_tokens=False)]
        labels = [IGNORED] * len(ids)
        for text, label in zip(row["completions"], row["labels"], strict=True):
            step = own.encode(text, add_special_tokens=False) + own.encode(" ;", add_special_tokens=False)
            ids, labels = ids + step, labels + [IGNORED] * (len(step) - 1) + [int(label)]
        features.append({"input_ids": ids, "labels": labels})
    collate = transformers.DataCollatorForTokenClassification(own, padding="max_length", max_length=32)
    inputs = collate(features)
    real = inputs["attention_mask"].numpy() > 0
    np.testing.assert_array_equal(inputs["input_ids"].numpy()[real], batch.tokens[real])
    np.testing.assert_array_equal(real, batch.segments == 0)
    np.testing.assert_array_equal(inputs["labels"].numpy(), np.where(batch.weights > 0, batch.labels, IGNORED))
    out = theirs(**inputs)
    out.loss.backward()
    value, grads, _ = ours(objective, model, params, batch)
    assert value == pytest.approx(float(out.loss.detach()), rel=1e-5)
    same_gradients(model, grads, theirs)


def test_tokens_of_trl_where_it_has_the_trainer():
    """Rows tokenized by TRL's own function; not in every release."""
    trainer = pytest.importorskip("trl.experimental.prm").PRMTrainer
    own, tokenizer = (f(str(embedded_folder())) for f in (transformers.AutoTokenizer.from_pretrained, load_tokenizer))
    for last in (False, True):
        options = ProcessReward(last_step_only=last).data_options()
        typed = type_rows([Row(x, f"x:{i}") for i, x in enumerate(STEPS)])
        examples = encode_steps(typed, tokenizer, Loader(max_length=12), **options).examples
        for i, row in enumerate(STEPS):
            want = trainer.tokenize_row(
                row, own, step_separator="\n", max_length=12, max_completion_length=None, train_on_last_step_only=last,
                is_eval=False,
            )  # fmt: skip
            part = slice(examples.offsets[i], examples.offsets[i + 1])
            assert (examples.input_ids[part].tolist(), examples.tags[part].tolist()) == (
                want["input_ids"],
                want["labels"],
            )


PLACES = [(3, 5), (0, 0), (4, 10)]


def questions(places=PLACES):
    """A batch of ours, and transformers' inputs of each row alone."""
    _, tags, inputs = tagged(3)
    starts, ends = np.asarray(places, np.int32).T
    index = np.arange(len(places), dtype=np.int32)
    weights = np.ones(len(places), np.float32)
    batch = SpanBatch(tags.tokens, tags.positions, tags.segments, tags.types, starts, ends, weights, index)
    alone = []
    for i, n in enumerate(LENGTHS):
        row = {k: inputs[k][i : i + 1, :n] for k in ("input_ids", "attention_mask")}
        row["token_type_ids"] = torch.tensor(tags.types[i : i + 1, :n], dtype=torch.long)
        alone.append(row)
    return batch, alone


def check_spans(theirs, want, value, grads, model):
    theirs.zero_grad()
    want.backward()
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    same_gradients(model, grads, theirs)


@pytest.fixture
def reader(tmp_path):
    theirs = torch_model(tmp_path, "Bert", "QuestionAnswering", SIZES)
    return theirs, *hf.load(str(tmp_path))


def test_question_answering(reader):
    """The mean of the windows' losses, each without padding, which transformers would let into the softmax."""
    theirs, model, params = reader
    batch, alone = questions()
    value, grads, out = ours(QuestionAnswering(), model, params, batch)
    losses = [
        theirs(**row, start_positions=torch.tensor([a]), end_positions=torch.tensor([b])).loss
        for row, (a, b) in zip(alone, PLACES, strict=True)
    ]
    check_spans(theirs, sum(losses) / len(losses), value, grads, model)
    # rows that only fill the batch are of no account
    filler = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), batch)
    filler = filler.replace(
        weights=np.float32([1, 1, 1, 0]), segments=np.concatenate([batch.segments, batch.segments[:1] * 0 - 2])
    )
    assert ours(QuestionAnswering(), model, params, filler)[0] == pytest.approx(value, rel=1e-6)


def test_positions_outside_of_the_window(reader):
    """Rows of one length in one batch: transformers takes what is below 0 as 0, and leaves out what is beyond the window."""
    theirs, model, params = reader
    n = min(LENGTHS)
    places = [(-2, 3), (2, n), (40, 4)]
    batch, alone = questions(places)
    cut = {k: getattr(batch, k)[:, :n] for k in ("tokens", "positions", "segments", "types")}
    value, grads, _ = ours(QuestionAnswering(), model, params, batch.replace(**cut))
    inputs = {k: torch.cat([row[k][:, :n] for row in alone]) for k in alone[0]}
    starts, ends = torch.tensor(places).T
    want = theirs(**inputs, start_positions=starts.clone(), end_positions=ends.clone()).loss
    check_spans(theirs, want, value, grads, model)


def test_windows_are_those_of_the_tokenizer():
    """Of a BERT tokenizer, whose texts are lower-cased and whose words are pieces: answers decode to what they are."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "un",
        "##believ",
        "##able",
        "story",
        "of",
        "cafe",
        "who",
        "?",
        ",",
        "paris",
    ]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    raw.decoder = decoders.WordPiece()
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    context = "story , of Café " * 3 + "Unbelievable Paris"
    answer = {"text": ["Unbelievable"], "answer_start": [context.index("Unb")]}
    typed = type_questions([Row({"question": "Who?", "context": context, "answers": answer}, "x:1")])
    examples = encode_questions(typed, own, Loader(max_length=12), stride=3).examples
    found = []
    for i in range(len(examples)):
        part = slice(examples.offsets[i], examples.offsets[i + 1])
        start, end = examples.spans[i]
        found.append(own.decode(examples.input_ids[part][start : end + 1].tolist()))
        chars = examples.chars[part][start : end + 1]
        if start:
            assert context[chars[0, 0] : chars[-1, 1]] == "Unbelievable"
            assert set(examples.types[part][start : end + 1].tolist()) == {1}
    assert found.count("unbelievable") >= 1 and set(found) == {"[CLS]", "unbelievable"}
