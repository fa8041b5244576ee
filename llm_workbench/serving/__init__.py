"Many texts at a time: pages, schedules, an engine, a server."
