"""Servers that send who asks elsewhere."""

from tests.support.bad_answers import Answer, Request
from tests.support.bad_servers import BadServer


def redirecting(server: BadServer, other: str, *, status: int = 302) -> None:
    """From now on a server answers every request with the same path of another one."""

    def answer(request: Request) -> tuple[Answer, bytes]:
        return Answer(status=status, headers={"Location": other + request.path}), b""

    server.answer = answer
