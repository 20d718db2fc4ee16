"""A long run of requests that come, share, are preempted, aborted and judged: nothing wrong, nothing left behind."""
