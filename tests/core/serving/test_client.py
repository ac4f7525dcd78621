"""What the thin client refuses before it asks a server."""

import json
import subprocess
import sys
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from roma_core.serving.client import RequestRejected, Series, ServedModel, ServerError
from tests.core.serving import toy


def test_what_is_no_number_is_refused_by_the_name_of_its_field():
    rows = [toy.series(2, seed=1), toy.series(2, seed=2)]
    rows[1].values["flux"][1] = Decimal("1.5")
    with pytest.raises(
        RequestRejected, match=r"series 1 \(id 's2'\): values: 'flux' .* numbers, got Decimal"
    ):
        ServedModel("http://127.0.0.1:9", timeout_s=2).predict(rows)


def test_the_client_and_the_types_of_requests_need_neither_torch_nor_mlflow():
    code = "import sys, roma_core.serving.client; print({'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "answers",
    [[{"features": [0.1] * 3000}], [], None, {"a": 1}],
    ids=["an encoder", "too few predictions", "nothing", "an object"],
)
def test_a_server_of_another_kind_is_a_server_error(monkeypatch, answers):
    served = ServedModel("http://127.0.0.1:1")
    monkeypatch.setattr(served, "_post", lambda rows: answers)

    with pytest.raises(ServerError, match="returns") as caught:
        served.predict([Series(positions={"time": [0.0]}, values={"flux": [1.0]})])
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_the_input_that_mlflow_puts_before_a_reason_is_left_out():
    """As the server of a model from an earlier version of this project answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            message = f"Failed to predict data '{[0.0] * 3000}'. \nError: series 0: 'b' is missing"
            body = json.dumps({"error_code": "BAD_REQUEST", "message": message}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RequestRejected, match=r"^series 0: 'b' is missing$"):
            ServedModel(f"http://127.0.0.1:{server.server_port}").predict([toy.series(2)])
        server.shutdown()
