"""A page and an HTTP API in front of one engine, for one machine; needs the extra `cascade-diffusion[studio]`.

What is asked for waits in one queue, which all tabs and programs share. What is drawn goes into a batch folder.
"""
