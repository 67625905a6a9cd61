"""Conversations at the terminal: tokens equal to transformers', earlier turns kept, all endings."""
import shutil
from functools import partial

import mlx.core as mx
import pytest
from conftest import TINY, assert_one_clear_line, run

import generate
from generate import sample
from model import load
from report import conversation
from report.conversation import converse, stream_text
from text.chat import STOPS
from text.tokenizer import load_tokenizer

CHAT = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
TURNS = ["add 3 and 4", "what is 7 * 8", "and 2 more"]


def greedy(logits, uniform):
    return generate.choose(logits, uniform, 0.0)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The bundled model, with a chat template beside it."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def talk(texts, replies, system=None):
    """Messages up to the last of the texts."""
    messages = [{"role": "system", "content": system}] if system else []
    for n, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        if n < len(texts) - 1:
            messages.append({"role": "assistant", "content": replies[n]})
    return messages


def expected_replies(folder, template, limit, system=None, texts=TURNS):
    """Each turn by `sample` at temperature 1, its prompt encoded and read from the start."""
    model, tokenizer = load(folder)
    replies = []
    for n in range(len(texts)):
        ids, _ = tokenizer.encode_messages(talk(texts[:n + 1], replies, system), template)
        done = sample(model, tokenizer, [ids], limit, temperature=1, key=mx.random.key(n),
                      **tokenizer.reply_ends(template))[0]
        replies.append(done.text.removeprefix(" ") if template == "plain" else done.text)
    return replies


# --------------------------------------------------------------------------------------------------
# the real model


@pytest.mark.parametrize("system", [None, "You are a pirate. Answer in one sentence."])
def test_three_turns_equal_transformers(smollm2, system, monkeypatch, capsys):
    """Greedy, float32: the prompts' ids, every token drawn, and the text that was printed."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    texts = ["What is the capital of France?", "And which river flows through it?",
             "Write two short sentences about that river."]
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts, tokens, replies = [], [], []
    for n in range(3):
        ids = their_tokenizer.apply_chat_template(
            talk(texts[:n + 1], replies, system), add_generation_prompt=True, return_tensors="pt",
            return_dict=False)
        drawn = theirs.generate(ids, max_new_tokens=48, do_sample=False,
                                pad_token_id=2)[0, ids.shape[1]:].tolist()
        prompts.append(ids[0].tolist())
        tokens += drawn
        replies.append(their_tokenizer.decode(drawn, skip_special_tokens=True))
    ours, seen = {"prompts": [], "tokens": []}, (generate.choose, conversation.stream_text)

    def choose(*args):
        found = seen[0](*args)
        ours["tokens"].append(found[0].item())
        return found

    def stream(model, tokenizer, prompt, *args, **keys):
        ours["prompts"].append(prompt)
        return seen[1](model, tokenizer, prompt, *args, **keys)
    monkeypatch.setattr(generate, "choose", choose)
    monkeypatch.setattr(conversation, "stream_text", stream)
    converse(*load(smollm2, "float32"), texts, "chat", system, 48, 0, greedy)
    assert ours == {"prompts": prompts, "tokens": tokens} and tokens.count(2) == 3
    assert capsys.readouterr().out == "".join(f"{reply}\n" for reply in replies)


# --------------------------------------------------------------------------------------------------
# small models


@pytest.mark.parametrize("template, system", [("plain", None), ("plain", "Be brief."),
                                              ("chat", None), ("chat", "Be brief.")])
def test_piped_turns(chatty, template, system):
    """All earlier turns stand in a prompt, and the system's text in front of them."""
    done = run("generate.py", "--ckpt", chatty, "--chat", "--template", template,
               "--max-tokens", 9, "--temperature", 1, *(["--system", system] if system else []),
               stdin="".join(f"{text}\n" for text in TURNS), check=0)
    replies = expected_replies(chatty, template, 9, system)
    assert done.stdout == "".join(f"{reply}\n" for reply in replies) and len(set(replies)) == 3
    assert replies != expected_replies(chatty, template, 9, "Be long." if system else "Be brief.")


def test_what_was_read_is_not_read_again(chatty, monkeypatch):
    """A second prompt is read from where the first ended: its reply, and the new message."""
    model, tokenizer = load(chatty)
    prompts, read = [], []
    stream, last_resid = conversation.stream_text, model.last_resid

    def streamed(model, tokenizer, prompt, *args, **keys):
        prompts.append(len(prompt))
        return stream(model, tokenizer, prompt, *args, **keys)

    def counted(tokens, cache):
        read.append(tokens.shape[1])
        return last_resid(tokens, cache)
    monkeypatch.setattr(conversation, "stream_text", streamed)
    model.last_resid = counted
    converse(model, tokenizer, TURNS[:2], "chat", None, 5, 0, greedy)
    assert [n for n in read if n > 1] == [prompts[0], prompts[1] - prompts[0]]


def test_another_beginning_is_read_anew(chatty, capsys):
    """A template that leaves earlier turns out: no prompt extends the one before it."""
    model, tokenizer = load(chatty)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ (m['role'] if loop.last else 'old') + ': ' + m['content'] "
        "+ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'go:' }}{% endif %}")
    converse(model, tokenizer, TURNS, "chat", None, 7, 0, greedy)
    replies = []
    for n in range(3):
        ids, _ = tokenizer.encode_messages(talk(TURNS[:n + 1], replies), "chat")
        replies.append(sample(model, tokenizer, [ids], 7, many_lines=True)[0].text)
    assert capsys.readouterr().out == "".join(f"{reply}\n" for reply in replies)


def test_empty_line_and_end_of_input(chatty):
    ask = lambda text: run("generate.py", "--ckpt", chatty, "--chat", "--max-tokens", 4,
                           "--temperature", 1, stdin=text, check=0)
    first, = expected_replies(chatty, "chat", 4, texts=TURNS[:1])
    assert ask(TURNS[0]).stdout == first + "\n"                 # the last line break is missing
    assert ask(f"{TURNS[0]}\n \n{TURNS[1]}\n").stdout == first + "\n"
    assert ask("").stdout == ask("\n").stdout == ""
    assert ask(b"\xe9\n".decode("latin-1")).stdout              # not what a pipe should say
    notes = ask("").stderr.splitlines()
    assert notes == ["note: template chat, the model's own; --template takes another"]


def test_a_conversation_beyond_the_context(chatty):
    """It goes on as long as it can; then one line. A reply that is cut is said to be."""
    done = run("generate.py", "--ckpt", chatty, "--chat", "--template", "lines",
               "--max-tokens", 40, "--temperature", 2, stdin="add 3 and 4\n" * 30)
    assert_one_clear_line(done, "exceed the model's context of 128", "start anew")
    assert 2 <= len(done.stdout.splitlines()) < 30
    limit = "note: the reply ends at its limit of 3 tokens (--max-tokens, or the context)"
    done = run("generate.py", "--ckpt", chatty, "--chat", "--max-tokens", 3, stdin="7", check=0)
    assert done.stderr.splitlines()[1:] == [limit]


@pytest.mark.parametrize("words, expected", [
    (("--chat",), "without a chat template"),
    (("--prompt", "x", "--template", "chat"), "without a chat template"),
    (("--chat", "--template", "none"), "--chat and --system need a template"),
    (("--prompt", "x", "--system", "y"), "--chat and --system need a template"),
    (("--chat", "--prompt", "x"), "not allowed with"), ((), "--prompt --chat is required"),
    (("--chat", "--template", "cued", "--max-tokens", "2"), "cued is for one instruction")])
def test_bad_input(words, expected):
    done = run("generate.py", "--ckpt", TINY, *words, stdin="7 * 8\nagain\n")
    assert_one_clear_line(done, expected)


def test_a_prompt_in_a_template(chatty):
    """Each prompt is a conversation of its own; by default a model reads prompts as they are."""
    ask = lambda *words: run("generate.py", "--ckpt", chatty, "--max-tokens", 6, *words, check=0)
    reply, = expected_replies(chatty, "plain", 6, texts=TURNS[:1])
    done = ask("--prompt", TURNS[0], "--prompt", TURNS[1], "--template", "plain",
               "--temperature", 1)
    assert done.stdout.startswith(f"{TURNS[0]}\n{reply}\n{TURNS[1]}\n")
    bare = ask("--prompt", "7 * 8 = ")
    assert "note: template none, the prompt as it is; --template takes another" in bare.stderr
    assert bare.stdout == ask("--prompt", "7 * 8 = ", "--template", "none").stdout
    assert bare.stdout.startswith("7 * 8 = ") and bare.stdout.count("\n") == 1
    assert len(ask("--prompt", "7", "--template", "chat", "--max-tokens", 999).stdout) > 4


# --------------------------------------------------------------------------------------------------
# what ends a reply, and what waits


def scripted(monkeypatch, ids):
    script = iter(ids)

    def choose(logits, *_):
        return mx.array([next(script)]), mx.zeros(1), mx.zeros(1)
    monkeypatch.setattr(generate, "choose", choose)


def test_half_of_a_stop_is_not_shown(model, tokenizer, monkeypatch):
    """One piece a token; what may begin a stop waits, and is shown where none comes of it."""
    ids = [*tokenizer.encode("56"), *tokenizer.encode("\nUse 7\nUser: 3")[1:]]
    scripted(monkeypatch, ids)
    pieces = list(stream_text(model, tokenizer, [1, 5], 64, greedy, many_lines=True,
                              stops=STOPS["plain"]))
    names = [tokenizer.piece(i) for i in ids[:len(pieces)]]
    assert names == ["·56", "<0x0A>", "U", "s", "e", "·7", "<0x0A>", "U", "s", "e", "r", ":"]
    assert pieces == ["56", "", "", "", "", "\nUse 7", *[""] * 6]


def test_a_held_piece_comes_at_the_limit(model, tokenizer, monkeypatch):
    ids = [*tokenizer.encode("56"), *tokenizer.encode("\nUser: 3")[1:]]
    scripted(monkeypatch, ids)
    pieces = list(stream_text(model, tokenizer, [1, 5], 4, greedy, many_lines=True,
                              stops=STOPS["plain"]))
    assert pieces == ["56", "", "", "\nUs"]


@pytest.mark.parametrize("key", range(4))
def test_streaming_equals_sampling_with_stops(model, tokenizer, key):
    """Random tokens, stops that are among them, cut by the limit or ended."""
    ids = tokenizer.encode_prompt("7 * 8 = ")
    keys = {"key": mx.random.key(key), "many_lines": True}
    hot = partial(generate.choose, temperature=1.0)
    free = sample(model, tokenizer, [ids], 24, temperature=1.0, **keys)[0].text
    for stops in ((), (free[5:8],), (free[-3:], free[9:11])):
        whole = sample(model, tokenizer, [ids], 24, temperature=1.0, stops=stops, **keys)[0]
        pieces = list(stream_text(model, tokenizer, ids, 24, hot, stops=stops, **keys))
        assert "".join(pieces) == whole.text and len(pieces) == len(whole.ids)
        assert not stops or whole.finished


def test_a_template_ends_replies_with_its_own_token(chatty, monkeypatch):
    """One that is not EOS, as a base model's may: streamed and sampled replies end at it."""
    model, tokenizer = load(chatty)
    assert tokenizer.reply_ends("none") == {"many_lines": True}
    assert tokenizer.reply_ends("lines") == {"many_lines": True, "stops": ("\n",), "ends": set()}
    assert tokenizer.reply_ends("chat")["ends"] == {tokenizer.eos_id}
    tokenizer.chat_template = CHAT.replace("eos_token", "bos_token")
    assert tokenizer.reply_ends("chat")["ends"] == {tokenizer.bos_id} != tokenizer.eos_ids
    ids = [*tokenizer.encode("5\n6"), tokenizer.bos_id, *tokenizer.encode("7")]
    keys = tokenizer.reply_ends("chat")
    scripted(monkeypatch, ids)
    assert "".join(stream_text(model, tokenizer, [1, 5], 16, greedy, **keys)) == "5\n6"
    scripted(monkeypatch, [*ids, *[tokenizer.eos_id] * 9])
    done = sample(model, tokenizer, [[1, 5]], 16, **keys)[0]
    assert (done.text, done.finished, done.ids) == ("5\n6", True, ids[:-1])
    # a template that writes nothing behind a reply
    tokenizer.chat_template = CHAT.replace("eos_token + '\\n'", "'\\n'")
    assert tokenizer.reply_ends("chat")["ends"] == set()


def test_reply_behind_a_cue_has_no_space(llama3, chatty, monkeypatch, capsys):
    """A byte-level token holds the space between cue and reply; it is neither shown nor doubled."""
    model, tokenizer = load(chatty)[0], load_tokenizer(llama3)
    drawn = [[*tokenizer.encode(" multiply"), 1], [*tokenizer.encode(" = "), 1]]
    scripted(monkeypatch, drawn[0] + drawn[1])
    prompts, stream = [], conversation.stream_text

    def streamed(model, tokenizer, prompt, *args, **keys):
        prompts.append(tokenizer.decode(prompt))
        return stream(model, tokenizer, prompt, *args, **keys)
    monkeypatch.setattr(conversation, "stream_text", streamed)
    converse(model, tokenizer, ["a", "b"], "plain", None, 20, 0, greedy)
    assert capsys.readouterr().out == "multiply\n= \n"
    assert prompts[1] == "User: a\nAssistant: multiply\nUser: b\nAssistant:"
