"""OpenVINO on the CPU: the fast embedded engine, with real INT8."""
