"""What every benchmark shares: the frame of a run (options, progress, files), the stopwatch, this
machine and its limits, other libraries, processes, bars, pages and plots.
"""
