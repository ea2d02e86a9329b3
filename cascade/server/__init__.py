"""A web page and an HTTP API for one engine on one machine; needs the extra `cascade-diffusion[studio]`.

All tabs and programs share one queue of jobs. Pictures are written to a batch folder.
"""
