"""Log-likelihoods, greedy flags and continuations against the full forward, whatever the batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from attnlab import mixers
from attnlab.data.tokenizers import BytesTokenizer
from attnlab.errors import UserError
from attnlab.evaluate import cloze, requests
from attnlab.evaluate.generate import Sampling, generate
from attnlab.evaluate.scorer import Scorer, settings, unknown
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.train.state import Model
from tests.train import runs

L, VOCAB, START = 16, 23, 0
OPTIONS = {"loss_chunk": 8, "loss_impl": "chunked"}
TOKENIZER = BytesTokenizer()


@pytest.fixture(scope="module")
def trained():
    """A model of two kinds of layers, its scorer, and its log-softmax over whole rows in float64."""
    nodes = {"A": {"name": "softmax", "heads": 2, "window": 5}, "B": {"name": "gated_deltanet", "heads": 2}}
    table = mixer_table(nodes, "m")
    config = LanguageModelConfig(vocab=VOCAB, width=16, layers=2, mixers=table, pattern="AB", logit_cap=5.0)
    model = Model.of(config)
    params = jax.tree.map(lambda p: 3 * p, runs.drawn(model))

    @jax.jit
    def forward(params, tokens):
        lm = model.merge(params)
        return lm.logits(lm.hidden(tokens, mixers.Sequence.whole(*tokens.shape)).y)

    def log_softmax(ids):
        """[n, V] of a row of n tokens."""
        padded = np.zeros((1, 2 * L), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(params, padded))[0, : len(ids)].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return model, params, Scorer(model.merge, params, L, 4, OPTIONS), log_softmax


def drawn(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).astype(np.int32) for n in lengths]


def expected(log_softmax, context, continuation):
    whole = np.concatenate([context, continuation])[-(L + 1) :]
    rows = log_softmax(whole[:-1])[-len(continuation) :]
    return rows[np.arange(len(continuation)), continuation].sum(), bool((rows.argmax(-1) == continuation).all())


def greedy(log_softmax, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(log_softmax(np.asarray(ids))[-1].argmax()))
    return np.asarray(ids[len(context) :], np.int32)


def test_log_likelihoods_and_greedy_flags_are_those_of_the_full_forward(trained):
    """Continuations of many lengths, full rows and contexts too long among them; greedy ones are flagged, and those
    that end otherwise are not."""
    _, _, scorer, log_softmax = trained
    pairs = list(zip(drawn(1, 1, 3, 5, 9, 15, 16, 30, 7), drawn(2, 1, 4, 2, 7, 2, 1, 9, 16)))
    for context, count in zip(drawn(3, 4, 9, 2), (1, 5, 3)):
        best = greedy(log_softmax, context, count)
        pairs += [(context, best), (context, np.append(best[:-1], (best[-1] + 1) % VOCAB).astype(np.int32))]
    wrong = np.append(context, (best[0] + 1) % VOCAB).astype(np.int32)  # and greedy from there on
    pairs.append((context, np.concatenate([wrong[-1:], greedy(log_softmax, wrong, 2)])))
    before = scorer.counts.truncated
    found = scorer.continuations(pairs)
    want = [expected(log_softmax, *pair) for pair in pairs]
    np.testing.assert_allclose([f[0] for f in found], [w[0] for w in want], rtol=1e-5, atol=1e-5)
    assert [f[1] for f in found] == [w[1] for w in want]
    assert [f[1] for f in found[-7:]] == [*[True, False] * 3, False]
    assert scorer.counts.truncated - before == sum(len(a) + len(b) > L + 1 for a, b in pairs) == 2


def test_a_request_is_what_it_is_alone(trained):
    """In the order given; a batch's other rows and the filling change nothing but rounding."""
    _, _, scorer, _ = trained
    pairs = list(zip(drawn(4, 2, 12, 6, 3, 9), drawn(5, 3, 2, 1, 9, 7)))
    together = scorer.continuations(pairs)
    for pair, answer in zip(pairs, together):
        (alone,) = scorer.continuations([pair])
        np.testing.assert_allclose(alone[0], answer[0], rtol=1e-5)
        assert alone[1] == answer[1]
    assert scorer.continuations(pairs[::-1])[::-1] == together


def test_choices_of_one_context_share_its_forward(trained):
    """Twenty one-token answers of one question are three rows, and each is its own column of the softmax."""
    _, _, scorer, log_softmax = trained
    (context,) = drawn(6, 6)
    before = scorer.counts.rows
    found = scorer.continuations([(context, np.asarray([i], np.int32)) for i in range(20)])
    assert scorer.counts.rows - before == 3
    want = log_softmax(context)[-1]
    np.testing.assert_allclose([f[0] for f in found], want[:20], rtol=1e-5, atol=1e-5)
    assert [f[1] for f in found] == [i == want.argmax() for i in range(20)]


@pytest.mark.parametrize("count", [0, 1, L - 1, L, L + 1, 2 * L, 3 * L + 5])
def test_rolling_predicts_every_token_once(count):
    """Each with at least as much context as a window of its own would have, none with more than a row holds."""
    ids = np.arange(1, count + 1, dtype=np.int32)
    rows = requests.windows(ids, START, L)
    predicted = np.concatenate([row.ids[-row.scored :] for row in rows]) if rows else ids
    np.testing.assert_array_equal(predicted, ids)
    stream = np.concatenate([[START], ids])
    for row in rows:
        assert row.length == min(L, count)
        np.testing.assert_array_equal(row.ids, stream[row.ids[0] : row.ids[0] + len(row.ids)])
    assert len(rows) == -(-count // L)


def test_rolling_sums_are_those_of_the_full_forward(trained):
    """Texts of every length about the row's in one call, an empty one among them; within a row, the whole text."""
    _, _, scorer, log_softmax = trained
    texts = drawn(7, L - 1, 0, L, L + 1, 3 * L + 5)
    found = scorer.rolling(texts, START)
    for ids, answer in zip(texts, found):
        want, done = 0.0, 0
        while done < len(ids):  # as the definition says it: the last row ends with the text
            end = min(done + L, len(ids))
            first = max(end - L, 0)
            inputs = np.concatenate([[START], ids])[first:end]
            logp = log_softmax(inputs)
            want += sum(logp[i - first, ids[i]] for i in range(done, end))
            done = end
        np.testing.assert_allclose(answer, want, rtol=1e-5)
    assert found[1] == 0


def test_few_shapes():
    """Any mix of lengths gives batches of one shape a bucket, at most full, each request in one of them."""
    lengths = np.random.default_rng(8).integers(1, 300, 1000)
    sizes = [requests.bucket(int(n), 32, 300) for n in lengths]
    assert all(n <= size <= max(32, 2 * n) for n, size in zip(lengths, sizes)) and set(sizes) == {32, 64, 128, 256, 300}
    made = list(requests.batches(sizes, 1200, 2))
    assert len({(length, rows) for _, length, rows in made}) == 5
    assert [length for _, length, _ in made] == sorted([length for _, length, _ in made], reverse=True)
    assert sorted(i for places, _, _ in made for i in places) == list(range(1000))
    for places, length, rows in made:
        assert 1 <= len(places) <= rows and rows % 2 == 0 and rows * length <= 1200
        assert all(sizes[i] == length for i in places)
    (only,) = requests.batches([64] * 3, 10_000, 1)
    assert only == ([0, 1, 2], 64, 4)
    with pytest.raises(ValueError, match="301 positions"):
        requests.bucket(301, 32, 300)


def test_generation_in_batches_is_generation_alone(trained):
    """Drawn, prompts of many lengths; a long one is read from its end, and keys go by the number."""
    model, params, scorer, _ = trained
    prompts = drawn(9, 3, 14, 1, 5, 6, 2, 30)
    sampling, before = Sampling(tokens=6, temperature=1.0, seed=3), len(scorer._generating)
    found = scorer.generate(prompts, sampling)
    want = generate(model.merge, params, [p[-(L - 6) :] for p in prompts], sampling).tokens
    for a, b in zip(found, want):
        np.testing.assert_array_equal(a, b)
    assert len(scorer._generating) == before + 1
    assert all(map(np.array_equal, found, scorer.generate(prompts, sampling)))
    assert len(scorer._generating) == before + 1
    with pytest.raises(ValueError, match="no room"):
        scorer.generate(prompts, Sampling(tokens=L))


def test_generation_ends_at_any_of_its_stop_tokens(trained):
    """With the token, and at its count of tokens without one."""
    _, _, scorer, _ = trained
    prompts = drawn(10, 3, 4, 5, 6)
    free = scorer.generate(prompts, Sampling(tokens=6, temperature=1.0))
    stop = tuple(sorted({int(free[0][2]), int(free[1][4])}))
    ended = scorer.generate(prompts, Sampling(tokens=6, temperature=1.0, stop=stop))
    for a, b in zip(free, ended):
        where = np.flatnonzero(np.isin(a, stop))
        np.testing.assert_array_equal(b, a[: where[0] + 1] if len(where) else a)
    assert len(ended[0]) <= 3 and all(len(a) == 6 for a in free)


def test_text_ends_before_the_first_stop_string():
    """Of several the one that is first in the text; one that spans tokens, too."""
    assert requests.cut("a b\n\nQ: c.", ["Q:", "\n\n", "zzz"]) == "a b"
    assert requests.cut("a b", ["", "c"]) == "a b" and requests.cut("xa", ["xa", "a"]) == ""
    assert requests.stop_tokens(TOKENIZER, ["\n", "ab", ""]) == (10, 256)
    assert requests.stop_tokens(TOKENIZER, []) == (256,)


def test_stop_tokens_of_merged_tokens(tmp_path):
    """Every token with a stop string in it, of byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from attnlab.data.tokenizers import load_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "Ċ" + "Ċ", "a" + "Ċ", "ab", "<|endoftext|>"]
    merges = [("Ċ", "Ċ"), ("a", "Ċ"), ("a", "b")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = {word: i for i, word in enumerate(words)}
    newline = {ids[word] for word in ("Ċ", "ĊĊ", "aĊ")}
    assert set(requests.stop_tokens(tokenizer, ["\n"])) == newline | {tokenizer.eod_id}
    context, continuation = requests.boundary(tokenizer, "xa", "b")  # one token spans the cut
    assert (context.tolist(), continuation.tolist()) == ([tokenizer.eod_id, ids["x"]], [ids["ab"]])


def test_continuations_begin_where_the_context_ends():
    """Spaces at the context's end are the continuation's; a context of nothing is the start of a document."""
    ids = lambda text: list(text.encode())
    for context, continuation, left, right in [("ab", " c", "ab", " c"), ("ab ", "c", "ab", " c"), ("", "c", "", "c")]:
        a, b = requests.boundary(TOKENIZER, context, continuation)
        assert (a.tolist(), b.tolist()) == ([256, *ids(left)], ids(right))
        assert a.dtype == b.dtype == np.int32
    with pytest.raises(UserError, match="is empty"):
        requests.boundary(TOKENIZER, "ab ", "")
    with pytest.raises(UserError, match="has 17 tokens, and rows have 16"):
        requests.row(np.zeros(3, np.int32), np.zeros(17, np.int32), 16)
    with pytest.raises(ValueError, match="cannot be predicted"):
        requests.Row(np.zeros(3, np.int32), 3)


def test_settings_of_a_request():
    """Greedy unless it samples; strings that end a text; what leaves no room is refused, what is unknown is named."""
    read = lambda **given: settings(given, TOKENIZER, 100, 7)
    sampling, stops = read(until="\n", temperature=0.7)
    assert (sampling.tokens, sampling.temperature, sampling.seed) == (50, 0.0, 7)
    assert (sampling.stop, sampling.vocab, stops) == ((10, 256), 257, ["\n"])
    sampling, stops = read(until=["ab", "c"], max_gen_toks=12, do_sample=True, top_p=0.5, num_beams=2)
    assert (sampling.tokens, sampling.temperature, sampling.top_p) == (12, 1.0, 0.5) and stops == ["ab", "c"]
    assert settings({}, TOKENIZER, 1000, 0)[0].tokens == 256
    assert unknown({"until": [], "num_beams": 2, "top_k": 1}) == {"num_beams"}
    for tokens in (0, 100):
        with pytest.raises(UserError, match=f"max_gen_toks = {tokens} is not possible; allowed: 1 to 99"):
            read(max_gen_toks=tokens)


def test_cloze_asks_for_words_that_the_passage_has():
    """The last of each passage that occurs before, whole; the context ends before its space."""
    text = "The green horse ate. A horse, greener than the horse in the field"
    assert list(cloze.passages(text)) == [("The green horse ate. A horse, greener than the", "horse")]
    assert list(cloze.passages("alpha beta alpha beta gamma delta gamma x", 4)) == [
        ("alpha beta alpha", "beta"),
        ("gamma delta", "gamma"),
    ]
    assert list(cloze.passages("some\nsome text 1234 1234 of of")) == []
    assert [cloze.first_word(t) for t in (" horse, and", "\n horses", " (x", "")] == ["horse", "horses", "", ""]


def test_error_of_a_ratio():
    """Of equal weights it is that of a mean; of any, about the spread of the ratio over draws of texts."""
    rng = np.random.default_rng(11)
    values = rng.normal(3, 2, 50)
    np.testing.assert_allclose(cloze.ratio_error(values, np.ones(50)), values.std(ddof=1) / np.sqrt(50))
    weights = rng.integers(1, 9, (4000, 200))
    sums = 2.0 * weights + rng.normal(0, 1, weights.shape) * weights
    spread = (sums.sum(1) / weights.sum(1)).std()
    found = np.mean([cloze.ratio_error(s, w) for s, w in zip(sums[:100], weights[:100])])
    np.testing.assert_allclose(found, spread, rtol=0.05)
    assert cloze.ratio_error([1.0], [2.0]) is None
