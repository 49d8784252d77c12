"""A real HTTP server on this machine that speaks chat completions, as a test tells it to."""

from collections.abc import Callable
import http.server
import json
import threading
from typing import Any

# (number of the request, its JSON) -> status, headers, body
Respond = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], str]]


def completion(text: str | None, why: str = "stop", **message: Any) -> str:
  """The body of a chat completion."""
  return json.dumps({"model": "stub-2026", "choices": [
      {"index": 0, "finish_reason": why, "message": dict(role="assistant", content=text,
                                                         **message)}]})


def says(text: str | None, *more: Any, **message: Any) -> tuple[int, dict[str, str], str]:
  return 200, {}, completion(text, *more, **message)


class Stub:
  """Answers as `respond` says, while it is entered; remembers what it was asked, in `asked`."""

  def __init__(self, respond: Respond):
    self.asked: list[dict[str, Any]] = []  # "headers" and "body" of each request
    self.together = 0                      # the most requests that were under way at once
    lock, under_way = threading.Lock(), [0]
    stub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
          number = len(stub.asked)
          stub.asked.append(dict(headers=dict(self.headers), body=body, path=self.path))
          under_way[0] += 1
          stub.together = max(stub.together, under_way[0])
        status, headers, text = respond(number, body)
        with lock:
          under_way[0] -= 1
        try:
          self.send_response(status)
          for name, value in headers.items():
            self.send_header(name, value)
          self.send_header("Content-Length", str(len(text.encode())))
          self.end_headers()
          self.wfile.write(text.encode())
        except OSError:
          pass  # who asked has gone

      def log_message(self, *arguments: Any) -> None:
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1/chat/completions"

  def __enter__(self) -> "Stub":
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *error: Any) -> None:
    self._server.shutdown()
    self._server.server_close()
