"""Who is who: sizes of the parallel axes, launch environment, process groups."""
