"""The report: an HTML page about one run or several runs side by side, made from their folders alone."""
