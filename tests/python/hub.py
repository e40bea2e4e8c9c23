"""A server that stands in for the Hugging Face Hub, and for any web server with files: what huggingface_hub 2.4 asks of it.
No promise is tested here.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories of files: `files[repo][name]` are bytes. `served` lists every request, (method, path, bytes sent)."""

    def __init__(self):
        self.files, self.served, self.cut_after = {}, [], None

    def commit(self, repo):
        told = "".join(f"{n}{hashlib.sha256(b).hexdigest()}" for n, b in sorted(self.files[repo].items()))
        return hashlib.sha1(told.encode()).hexdigest()


@contextlib.contextmanager
def running():
    """(the hub, its address), while it runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def give(self, status, body=b"", **headers):
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            sent = b"" if self.command == "HEAD" else body
            cut = hub.cut_after
            if cut is not None and len(sent) > cut:
                hub.cut_after = None
                self.wfile.write(sent[:cut])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                hub.served.append((self.command, self.path, cut))
                return
            self.wfile.write(sent)
            hub.served.append((self.command, self.path, len(sent)))

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                return self.about("/".join(parts[2:4]), parts[4:])
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            if parts[2:3] != ["resolve"] or name not in hub.files.get(repo, {}):
                code = "EntryNotFound" if repo in hub.files else "RepoNotFound"
                return self.give(404, b"", X_Error_Code=code)
            body = hub.files[repo][name]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": hub.commit(repo)}
            headers |= {"Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            if asked and self.command == "GET":
                start, _, end = asked.removeprefix("bytes=").partition("-")
                end = min(int(end) if end else len(body) - 1, len(body) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                return self.give(206, body[int(start) : end + 1], **headers)
            return self.give(200, body, **headers)

        def about(self, repo, rest):
            if repo not in hub.files:
                return self.give(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if rest[:1] == ["tree"]:
                return self.give(
                    200,
                    [
                        {"type": "file", "path": n, "size": len(b), "oid": "0"}
                        for n, b in hub.files[repo].items()
                    ],
                )
            told = [{"rfilename": n} for n in hub.files[repo]]
            return self.give(200, {"id": repo, "sha": hub.commit(repo), "siblings": told, "private": False})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.files.setdefault(repo, {})
                return self.give(
                    200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo}
                )
            if parts == ["api", "validate-yaml"]:
                return self.give(200, {"errors": [], "warnings": []})
            repo = "/".join(parts[2:4])
            if parts[4] == "preupload":
                asked = json.loads(body)["files"]
                told = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in asked
                ]
                return self.give(200, {"files": told})
            if parts[4] == "commit":
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                oid = hub.commit(repo)
                where = f"http://{self.headers['Host']}/{repo}/commit/{oid}"
                return self.give(
                    200, {"success": True, "commitOid": oid, "commitUrl": where, "hookOutput": ""}
                )
            return self.give(404, {"error": self.path})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
