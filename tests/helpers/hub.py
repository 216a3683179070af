"""A Hugging Face hub on this machine."""

import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub


class Hub:
    """A hub on this machine: as much of its interface as downloads use, and faults on demand."""

    def __init__(self):
        self.repos = {}  # name -> {revision: {file: bytes}}
        self.requests = []  # (method, path)
        self.slow = 0  # seconds before weights are sent
        self.faults = []  # [pattern of "METHOD path", how often, status, or "cut", "flip", "stall" or "etag"]
        self.stalled = threading.Event()  # set when the hub closes
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.stalled.set()
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.utils.close_session()  # else it goes on over connections that are open

    def add(self, repo, revision, folder):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repos.setdefault(repo, {})[revision] = files

    def commit(self, repo, revision):
        parts = (part for name, data in sorted(self.repos[repo][revision].items()) for part in (name.encode(), data))
        return hashlib.sha1(b"\0".join([revision.encode(), *parts])).hexdigest()

    def find(self, repo, revision):
        for name in self.repos[repo]:
            if revision in (name, self.commit(repo, name)):
                return name
        return None

    def fault(self, pattern, status, times=10**9):
        self.faults.append([re.compile(pattern), times, status])

    def count(self, pattern):
        return sum(re.search(pattern, " ".join(request)) is not None for request in self.requests)

    def fault_of(self, request):
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault[1] > 0 and fault[0].search(" ".join(request)):
                    fault[1] -= 1
                    return fault[2]
        return None

    def answer(self, handler):
        path = unquote(urlsplit(handler.path).path)
        fault = self.fault_of((handler.command, path))
        if isinstance(fault, int):
            return self.reply(handler, b"{}", status=fault)
        if fault == "stall":
            self.stalled.wait(60)
            handler.close_connection = True
            return None
        api = re.fullmatch(r"/api/models/(.+?)(?:/(refs|revision/(.+)|tree/(.+)))?", path)
        resolve = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        repo = (api or resolve)[1]
        if repo not in self.repos:
            return self.reply(handler, b"{}", status=404, code="RepoNotFound")
        if api and api[2] == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.commit(repo, name)}
                for name in reversed(self.repos[repo])
            ]
            return self.reply(handler, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())
        asked = (api[3] or api[4] or "main") if api else resolve[2]
        revision = self.find(repo, asked)
        if revision is None and not (api and api[2] is None):
            return self.reply(handler, b"{}", status=404, code="RevisionNotFound")
        files = self.repos[repo].get(revision, {})
        commit = self.commit(repo, revision) if revision else "0" * 40
        if api and api[4]:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": self.etag(d)} for n, d in files.items()]
            return self.reply(handler, json.dumps(tree).encode())
        if api:
            described = [{"rfilename": name, **self.described(name, data)} for name, data in files.items()]
            info = {"id": repo, "sha": commit, "siblings": described}
            return self.reply(handler, json.dumps(info).encode())
        if resolve[3] not in files:
            return self.reply(handler, b"{}", status=404, code="EntryNotFound")
        data = files[resolve[3]]
        if handler.command == "GET" and resolve[3].endswith(".safetensors"):
            time.sleep(self.slow)
        etag = self.etag(b"another file" if fault == "etag" else data)
        if fault == "flip" and handler.command == "GET":
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self.reply(handler, data, cut=fault == "cut", ETag=f'"{etag}"', X_Repo_Commit=commit)

    @staticmethod
    def described(name, data):
        """What the hub says of a file: weights are large files, the others are git's."""
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            return {
                "size": len(data),
                "blobId": "0" * 40,
                "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 1},
            }
        return {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}

    @staticmethod
    def etag(data):
        return hashlib.sha1(data).hexdigest()

    @staticmethod
    def reply(handler, body, status=200, code=None, cut=False, **headers):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if code:
            handler.send_header("X-Error-Code", code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
