"""Names, revisions and folders against a Hub made here, and against folders that lie.

The Hub is a server on this machine that writes down what it is asked for, and with which token.
"""
import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlx.core as mx
import pytest
from conftest import GOLDEN, assert_one_clear_line, run

from files import disk, model_folder
from files.disk import read_json
from files.keys import BadInput
from files.model_folder import INDEX, find_folder, open_weights, read_index, weight_files

TOKEN = "hf_secret" + "0123456789" * 3
OLD, NEW = "a" * 40, "b" * 40       # commits
SHARDED = GOLDEN / "llama3_1"       # index and three shards
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
DECOYS = {"pytorch_model.bin": b"a pickle", "evil.py": b"raise SystemExit('executed')",
          "consolidated.safetensors": b"x", "adapter_model.safetensors": b"x", "README.md": b"x",
          "adapter_config.json": b"{}", "original/x.pth": b"x", "original/config.json": b"{}",
          "original/model.safetensors": b"x", "tokenizer.py": b"x"}


class FakeHub(ThreadingHTTPServer):
    """The four requests that huggingface_hub makes for a snapshot.

    repos   {name: {commit: {path: bytes}}};  refs {branch, tag or commit: commit}
    asked   (method, path, Authorization) in order
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.refs, self.asked = {}, {"main": OLD, "v2": NEW, "refs/pr/1": NEW}, []
        self.gated, self.echo, self.push_after = set(), False, None
        self.env = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}

    def files(self, repo):
        """(file, commit) of everything that was asked for of a repository."""
        parts = [path.split("/resolve/", 1) for method, path, _ in self.asked if method == "GET"]
        found = [p[1].split("/", 1)[::-1] for p in parts if p[0] == f"/{repo}" and len(p) == 2]
        return sorted((file, commit) for file, commit in found)


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status, code, message=""):
        self.reply(status, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.asked.append((self.command, path, self.headers.get("Authorization", "")))
        if server.echo:
            return self.refuse(400, "Bad", f"bad header {self.headers.get('Authorization')} at "
                               f"http://me:{TOKEN[3:]}@proxy/")
        about = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").split("/", 4)      # "", owner, repo, verb, rest
        repo, verb, rest = "/".join(parts[1:3]), parts[3], parts[4]
        if repo not in server.repos:
            return self.refuse(404, "RepoNotFound")
        revision, file = (rest, None) if about else rest.split("/", 1)
        commit = server.refs.get(revision, revision)
        if commit not in server.repos[repo]:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id: " + revision)
        files = server.repos[repo][commit]
        if verb == "revision":
            server.refs.update(server.push_after or {})
            return self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": [
                {"rfilename": name} for name in files]}).encode())
        if verb == "tree":
            return self.reply(200, json.dumps([
                {"type": "file", "path": name, "size": len(data), "oid": tag(data)}
                for name, data in files.items()]).encode())
        if repo in server.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        self.reply(200, files[file], ETag=f'"{tag(files[file])}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def tag(data):
    return hashlib.sha1(data).hexdigest()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def server(tmp_path, small_folder):
    """A sharded model in two versions, one in a single file, one that is gated, one all pickles."""
    server = FakeHub()
    sharded = {k: v for k, v in contents(SHARDED).items() if k != "expected.safetensors"}
    whole = contents(small_folder)
    server.repos = {
        "someone/sharded": {OLD: {**DECOYS, **sharded}},
        "someone/whole": {OLD: {**DECOYS, **whole},
                          NEW: {**whole, "config.json": whole["config.json"] + b" ",
                                "model.safetensors": changed(small_folder, tmp_path)}},
        "someone/gated": {OLD: whole},
        "someone/pickles": {OLD: {**DECOYS, "config.json": whole["config.json"]}},
        "someone/dataset": {OLD: {"data.parquet": b"x"}}}
    server.gated = {"someone/gated"}
    server.env["HF_HOME"] = str(tmp_path / "hf")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def changed(folder, tmp_path):
    """The weights file of the folder, every tensor plus one."""
    mx.save_safetensors(str(tmp_path / "v2.safetensors"), {
        k: v + 1 for k, v in mx.load(str(folder / "model.safetensors")).items()})
    return (tmp_path / "v2.safetensors").read_bytes()


def find(server, *names, check=None, weights=True, **env):
    """find_folder in a process of its own, as an entry point calls it: one folder a line."""
    code = ("from config import run_main; from files.model_folder import find_folder; "
            f"run_main(lambda _: [print(find_folder(n, weights={weights})) for n in {names}]"
            " and None)")
    return run("-c", code, check=check, **{**server.env, **env})


def found(server, name, **keys):
    """The folder's path, after a run that had to succeed and say nothing else."""
    done = find(server, name, check=0, **keys)
    assert [x for x in done.stderr.splitlines() if not x.startswith("note: ")] == []
    return Path(done.stdout.strip())


# --- what is fetched


def test_shards_of_the_index_and_nothing_else(server):
    folder = found(server, "someone/sharded")
    wanted = {"config.json", INDEX, *read_index(SHARDED).values()}
    assert len(wanted) == 5
    assert server.files("someone/sharded") == sorted((file, OLD) for file in wanted)
    assert {p.name for p in folder.rglob("*")} == wanted and folder.name == OLD
    assert all((folder / file).read_bytes() == (SHARDED / file).read_bytes() for file in wanted)
    # the cache's files are links, which the checks must let through
    assert (folder / INDEX).is_symlink()
    assert open_weights(folder).keys() == open_weights(SHARDED).keys()


def test_one_file_without_index_then_nothing_anew(server, small_folder):
    folder = found(server, "someone/whole")
    wanted = sorted(p.name for p in small_folder.iterdir())
    assert [file for file, _ in server.files("someone/whole")] == wanted
    asked = len(server.asked)
    assert found(server, "someone/whole") == folder
    again = [path for _, path, _ in server.asked[asked:]]
    assert again == ["/api/models/someone/whole/revision/main"]     # only: has it moved?


def test_without_weights_then_offline(server, small_folder):
    """from_scratch needs no weights; what is missing afterwards is said, also without a network."""
    folder = found(server, "someone/whole", weights=False)
    wanted = {p.name for p in small_folder.iterdir()} - {"model.safetensors"}
    assert {p.name for p in folder.iterdir()} == wanted
    assert {file for file, _ in server.files("someone/whole")} == wanted
    asked = len(server.asked)
    assert found(server, "someone/whole", weights=False, HF_HUB_OFFLINE="1") == folder
    done = find(server, "someone/whole", HF_HUB_OFFLINE="1")
    assert_one_clear_line(done, f"someone/whole@{OLD} is only partly in the Hub cache",
                          "it lacks model.safetensors", "HF_HUB_OFFLINE is set",
                          f"hf download someone/whole --revision {OLD}")
    assert len(server.asked) == asked
    assert found(server, "someone/whole") == folder and (folder / "model.safetensors").exists()
    assert found(server, "someone/whole", HF_HUB_OFFLINE="1") == folder
    (folder / "tokenizer.model").unlink()
    done = find(server, "someone/whole", HF_HUB_OFFLINE="1")
    assert_one_clear_line(done, "someone/whole is only partly in the Hub cache", "tokenizer.model")


def test_load_and_save_from_scratch_ask_for_no_weights(server, tmp_path):
    code = ("from pathlib import Path; from files.model_folder import model_files, write_files; "
            "from checkpoint import load_base; "
            "m, t = load_base('someone/whole', from_scratch=True); assert t; "
            f"write_files(Path({str(tmp_path / 'out')!r}), model_files(m, 'someone/whole'))")
    run("-c", code, check=0, **server.env)
    assert "model.safetensors" not in [file for file, _ in server.files("someone/whole")]
    assert open_weights(tmp_path / "out")


# --- revisions


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", NEW])
def test_revision_by_branch_or_commit(server, small_folder, revision):
    done = find(server, f"someone/whole@{revision}", "someone/whole", check=0)
    new, main = map(Path, done.stdout.split())
    assert (new.name, main.name) == (NEW, OLD)
    old, plus = (mx.load(str(f / "model.safetensors")) for f in (main, new))
    assert all(mx.array_equal(plus[k], old[k] + 1) for k in old)
    asked = len(server.asked)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert found(server, f"someone/whole@{revision}", **offline) == new
    assert_one_clear_line(find(server, "someone/whole@other", **offline),
                          "someone/whole@other is not in the Hub cache", "HF_HUB_OFFLINE is set")
    assert len(server.asked) == asked


def test_push_in_between_mixes_nothing(server):
    """main moves as soon as it was resolved: config, tokenizer and weights are still of one."""
    server.push_after = {"main": NEW}
    folder = found(server, "someone/whole")
    assert folder.name == OLD and {commit for _, commit in server.files("someone/whole")} == {OLD}
    assert (folder / "model.safetensors").read_bytes() == server.repos["someone/whole"][OLD][
        "model.safetensors"]


def test_unknown_revision(server):
    for revision in ("v3", "c" * 40):
        done = find(server, f"someone/whole@{revision}")
        assert_one_clear_line(done, f"someone/whole has no revision '{revision}'",
                              "branches, tags or commits", "someone/whole@REVISION")


@pytest.mark.parametrize("name", ["someone/whole@", "someone/whole@../../x", "someone/whole@/etc",
                                  "someone/whole@a b", "someone/whole@a\\b", "someone/whole@a..b"])
def test_revision_is_no_path(name, monkeypatch):
    monkeypatch.setattr(model_folder.huggingface_hub, "snapshot_download",
                        lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(BadInput, match="no revision; expected a branch, tag or commit"):
        find_folder(name)


def test_local_folder_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder.huggingface_hub, "snapshot_download",
                        lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("someone/whole", "someone/whole@v2", "a@b/c@d"):
        (tmp_path / name).mkdir(parents=True)
        assert find_folder(name) == Path(name)
    for name in ("models/none", "./a/b", "a/b/c", "a", "/a/b", "x" * 5000, "~nobody_here/x"):
        with pytest.raises(BadInput, match="model folder"):
            find_folder(name)


# --- what the Hub refuses


def test_gated_unknown_and_not_a_model(server):
    for name, *words in [
            ("someone/gated", "https://huggingface.co/someone/gated", "licence", "hf auth login"),
            ("someone/none", "no such model on the Hub", "spelling", "hf auth login"),
            ("someone/pickles", "no model.safetensors on the Hub", "only safetensors",
             "someone/pickles@refs/pr/NUMBER")]:
        assert_one_clear_line(find(server, name), name, *words)
    assert not {"pytorch_model.bin", "evil.py"} & {f for f, _ in server.files("someone/pickles")}
    done = find(server, "someone/dataset")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: someone/dataset has no config.json on the Hub")


def test_a_chat_template_in_a_file_of_its_own_comes_along(server):
    files = server.repos["someone/whole"][OLD]
    files["chat_template.jinja"] = b"{{ messages[0]['content'] }}"
    assert find(server, "someone/whole").returncode == 0
    assert ("chat_template.jinja", OLD) in server.files("someone/whole")


def test_index_that_names_decoys(server):
    """Neither a pattern nor a path in the index makes the Hub's library fetch a file by it."""
    files = server.repos["someone/sharded"][OLD]
    for entry in ("*.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        files[INDEX] = json.dumps({"weight_map": {"x": entry}}).encode()
        server.env["HF_HOME"] += "x"
        assert_one_clear_line(find(server, "someone/sharded"), INDEX, entry, "do not trust")
    assert not {f for f, _ in server.files("someone/sharded")} - {"config.json", INDEX}


def test_index_promises_what_the_hub_lacks(server):
    del server.repos["someone/sharded"][OLD]["model-00002-of-00003.safetensors"]
    assert_one_clear_line(find(server, "someone/sharded"),
                          "someone/sharded has no model-00002-of-00003.safetensors on the Hub")


def test_no_network_and_nothing_cached(server, tmp_path):
    done = find(server, "someone/whole", HF_ENDPOINT="http://127.0.0.1:9")
    assert_one_clear_line(done, "not in the Hub cache", "the Hub is not reachable",
                          "Connection refused);", "hf download someone/whole")
    done = run("lens.py", "--ckpt", "someone/else", "--prompt", "x",
               HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert_one_clear_line(done, "someone/else", "not in the Hub cache", "hf download someone/else")
    done = run("lens.py", "--ckpt", "models/none", "--prompt", "x")
    assert_one_clear_line(done, "no model folder 'models/none'")


def test_cache_prepared_by_hand(tmp_path):
    """The cache's own layout, where refs/main names a snapshot; no listing of what it lacks."""
    home = tmp_path / "hub" / "models--someone--golden-llama"
    shutil.copytree(SHARDED, home / "snapshots" / "abc123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    code = "from model import load; m, _ = load('someone/golden-llama'); print(m.args.vocab_size)"
    assert run("-c", code, check=0, **env).stdout.strip() == "320"
    (home / "snapshots" / "abc123" / SECOND).rename(tmp_path / SECOND)
    done = run("lens.py", "--ckpt", "someone/golden-llama", "--prompt", "x", **env)
    assert_one_clear_line(done, "someone/golden-llama", "model-00002-of-00003", "HF_HUB_OFFLINE")


# --- the token


def test_token_is_in_one_header_only(server, write_config, tmp_path):
    """A whole run with a model from the Hub: the token reaches the Hub, and no file or output."""
    path, folder = write_config(model="someone/whole@v2", steps=1)
    done = run("train.py", path, check=0, **server.env | {"HF_TOKEN": TOKEN})
    assert {authorization for _, _, authorization in server.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in str([path for _, path, _ in server.asked])
    files = [p for where in (folder, tmp_path / "hf") for p in where.rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert json.loads((folder / "adapter_config.json").read_text())["model"] == "someone/whole@v2"
    assert {"config.yaml", "adapter_config.json", "report.json", "metrics.jsonl"} <= names
    assert not [p for p in files if TOKEN.encode() in p.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


def test_token_that_comes_back_is_scrubbed(server, monkeypatch):
    server.echo = True
    done = find(server, "someone/whole", HF_TOKEN=TOKEN)
    assert f"Bearer {TOKEN}" in [authorization for *_, authorization in server.asked]
    assert_one_clear_line(done, "bad header Bearer <token>", "http://<token>@proxy")
    assert TOKEN[3:] not in done.stdout + done.stderr
    done = find(server, "someone/whole", HF_TOKEN="")    # of a login, so not in the environment
    assert_one_clear_line(done, "bad header")
    assert disk.one_line(f"b'Bearer {TOKEN}x' \x1b[2J{TOKEN}") == "b'Bearer <token>' ?[2J<token>"
    monkeypatch.setenv("HF_TOKEN", "api_org_x\n")     # of another shape
    assert disk.one_line("no user api_org_x at https://a.b/c@d") == "no user <token> at https://a.b/c@d"


def test_token_that_no_header_can_hold(server):
    """A quotation mark copied with it: the HTTP library raises an error that is not the Hub's."""
    done = find(server, "someone/whole", HF_TOKEN=TOKEN[:20] + "\u201d" + TOKEN[20:])
    assert_one_clear_line(done, "someone/whole", "hf auth login")
    assert TOKEN[:20] not in done.stderr and TOKEN[20:] not in done.stderr
    assert not server.asked


# --- folders that lie


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SHARDED, tmp_path / "model",
                    ignore=shutil.ignore_patterns("expected.safetensors"))
    return tmp_path / "model"


def edit_index(folder, **weight_map):
    raw = json.loads((folder / INDEX).read_text())
    raw["weight_map"] |= weight_map
    (folder / INDEX).write_text(json.dumps(raw))


def refused(folder, *words):
    with pytest.raises(BadInput) as error:
        open_weights(folder)
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def test_where_each_tensor_is(folder, small_folder):
    where = open_weights(folder)
    names = {file.name: {k for k, v in where.items() if v == file} for file in where.values()}
    assert names == {f.name: set(mx.load(str(f))) for f in weight_files(folder)} and len(names) == 3
    only = set(open_weights(small_folder).values())
    assert only == {small_folder / "model.safetensors"}


@pytest.mark.parametrize("entry", [
    "../model/" + FIRST, "/etc/x.safetensors", "sub/x.safetensors", "sub\\x.safetensors", "..",
    ".safetensors", "pytorch_model.bin", "x.safetensors.py", "*.safetensors", "x.safetensors\n",
    "", 1, None, ["x.safetensors"]])
def test_index_may_only_name_its_neighbours(folder, entry):
    """Also where the entry leads to a file that is there."""
    edit_index(folder, **{"model.norm.weight": entry})
    for read in (open_weights, weight_files):
        with pytest.raises(BadInput) as error:
            read(folder)
        words = (INDEX, "model.norm.weight", repr(entry), "do not trust")
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("raw", [{}, {"weight_map": {}}, {"weight_map": ["x.safetensors"]},
                                 {"weight_map": "x.safetensors"}])
def test_index_without_a_map(folder, raw):
    (folder / INDEX).write_text(json.dumps(raw))
    refused(folder, INDEX, "expected a weight_map", "do not trust")


def test_tensor_in_two_files(folder):
    first, second = mx.load(str(folder / FIRST)), mx.load(str(folder / SECOND))
    name = sorted(first)[0]
    save(folder / SECOND, {**second, name: first[name] + 1})
    refused(folder, name, FIRST, SECOND, "in two files")


def test_tensor_that_the_index_promises(folder):
    second = mx.load(str(folder / SECOND))
    name = sorted(second)[0]
    value = second.pop(name)
    save(folder / SECOND, second)
    refused(folder, INDEX, "promises 1 tensors", name, SECOND)
    save(folder / FIRST, {**mx.load(str(folder / FIRST)), name: value})     # there, but elsewhere
    refused(folder, INDEX, "promises 1 tensors", name, SECOND)


def save(path, tensors):
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / SECOND).unlink(), ("missing", SECOND)),
    (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), ("missing", SECOND)),
    (lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("gone")), ("missing", SECOND)),
    (lambda f: ((f / SECOND).unlink(), os.mkfifo(f / SECOND)), ("missing", SECOND)),
    (lambda f: (f / SECOND).write_bytes(b""), ("truncated or corrupt", SECOND)),
    (lambda f: (f / SECOND).write_bytes(b"\xff" * 500), ("truncated or corrupt", SECOND)),
    (lambda f: (f / INDEX).write_text("[" * 100_000), (INDEX, "not valid JSON")),
    (lambda f: (f / INDEX).write_bytes(b"\xff"), (INDEX, "not UTF-8")),
    (lambda f: (f / INDEX).unlink(), ("no model.safetensors", FIRST, "only safetensors")),
    (lambda f: [p.unlink() for p in f.iterdir()] and (f / "pytorch_model.bin").write_text("x"),
     ("no model.safetensors", "but pytorch_model.bin", "only safetensors")),
    (lambda f: (save(f / "model.safetensors", {}), (f / INDEX).unlink()),
     ("model.safetensors", "no tensors")),
])
def test_weights_that_are_not_there(folder, damage, words):
    damage(folder)
    refused(folder, *words)


def test_link_to_a_shard_in_a_local_folder(folder, tmp_path):
    (folder / SECOND).rename(tmp_path / "blob")
    (folder / SECOND).symlink_to(tmp_path / "blob")
    assert open_weights(folder) == {k: folder / v.name for k, v in open_weights(SHARDED).items()}


def test_no_permission(folder, tmp_path, monkeypatch):
    """Tests often run as root, whom no mode stops: the operating system's answer is put in."""
    def deny(name, path, owner=Path):
        original = getattr(owner, name)

        def denied(self, *args, **kwargs):
            if Path(self) == path:
                raise PermissionError(13, "Permission denied", str(self))
            return original(self, *args, **kwargs)
        monkeypatch.setattr(owner, name, denied)
    deny("open", folder / SECOND)
    refused(folder, SECOND, "Permission denied", "check its permissions")
    deny("stat", folder / INDEX)
    refused(folder, INDEX, "Permission denied", "check its permissions")
    deny("open", folder / "config.json", os)
    with pytest.raises(BadInput, match="config.json cannot be read .Permission denied"):
        read_json(folder / "config.json")
    deny("stat", tmp_path / "shut")
    with pytest.raises(BadInput, match="shut.*Permission denied"):
        find_folder(tmp_path / "shut")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_no_permission_by_mode(folder):
    (folder / SECOND).chmod(0)
    refused(folder, SECOND, "Permission denied", "check its permissions")
