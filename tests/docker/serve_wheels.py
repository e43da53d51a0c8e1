"""Serves a folder to pip, for those who know the password: python serve_wheels.py FOLDER PASSWORD; prints the port."""

import base64
import functools
import http.server
import sys

folder, password = sys.argv[1:]
AUTHORIZATION = "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files by GET."""

    def do_GET(self) -> None:
        """401 without the password."""
        if self.headers["Authorization"] == AUTHORIZATION:
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="wheels"')
        self.end_headers()


with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
