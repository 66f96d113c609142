"""Ray Serve: one service per device, on one machine or several, behind one HTTP server."""
