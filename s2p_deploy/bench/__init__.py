"""Speed, memory and size of engines against the floating-point engine of the same backend, in one run.

:func:`s2p_deploy.bench.measure.bench` is the way in. Nothing is imported here, so that the processes that run engines
hold little besides them.
"""
