"""For all tests: Ctrl-C reaches child processes even where the tests were started in the background, with it ignored."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
