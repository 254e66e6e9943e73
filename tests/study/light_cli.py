"""The command line with the light task's training: `python light_cli.py sweep study.toml`."""

import light_task

import towtank.study.run
from towtank.study.grid import Describer

if __name__ == "__main__":
    towtank.study.run._train_cells = lambda: light_task.work
    towtank.study.run.describer = lambda describe: Describer(light_task.describe)

    import towtank.study.dry_run

    towtank.study.dry_run.measured_rate = lambda *_, **__: 1e10

    from towtank.cli import main

    main()
