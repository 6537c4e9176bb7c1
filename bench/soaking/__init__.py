"""What `bench/soak.py` is made of; the fault suite asks its questions too. Knows llmd only as its command and its HTTP.

`questions`: what is asked.  `asking`: one request as a client sees it.  `server`: the command under test.
`clients`: those who want answers, and those who only make trouble.  `chaos`: what befalls the processes.
`report`: what came of it.  `run`: all of it together.
"""
