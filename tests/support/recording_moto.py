"""moto's server, which writes the head of every request it is sent into a file: PORT FILE."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

from tests.support.recorded import as_text


class Recording:
    """A WSGI application before another one."""

    def __init__(self, application: Any, log: Path) -> None:
        self._application, self._log = application, log.open("a", buffering=1)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        headers = [
            (name.removeprefix("HTTP_").replace("_", "-").lower(), str(value))
            for name, value in environ.items()
            if name.startswith("HTTP_")
        ]
        first = f"{environ['REQUEST_METHOD']} {environ.get('RAW_URI', environ['PATH_INFO'])}"
        self._log.write(json.dumps(as_text(first, headers)) + "\n")
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer


if __name__ == "__main__":
    port, log = sys.argv[1:]
    backend = DomainDispatcherApplication(create_backend_app)
    backend.debug = True
    run_simple(
        "127.0.0.1",
        int(port),
        Recording(backend, Path(log)),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
