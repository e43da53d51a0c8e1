"""Serve a folder to pip behind a password and print the port: python serve_wheels.py FOLDER PASSWORD."""

import base64
import functools
import http.server
import sys

folder, password = sys.argv[1:]
AUTHORIZATION = "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Request handler that serves files by GET to clients with the password."""

    def do_GET(self) -> None:
        """Serve a file, or answer 401 without the password."""
        if self.headers["Authorization"] == AUTHORIZATION:
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="wheels"')
        self.end_headers()


with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
