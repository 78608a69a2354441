"""What make deploy and its siblings say beside Ansible's own lines: what devices report, and which failed and why."""

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
    name: shelf
    type: aggregate
    short_description: what devices report, and at the end which failed and why
    description: Prints the output of tasks with the tag report, and a line for each device that failed.
"""


def reason(result):
    """The one line that says most, of a task's result."""
    result = next((item for item in result.get("results", ()) if item.get("failed")), result)
    for text in (result.get("stderr"), result.get("msg"), result.get("stdout")):
        lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
        if lines:
            return lines[-1]
    return "no reason given"


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "shelf"

    def __init__(self):
        super().__init__()
        self.failed = {}

    def v2_runner_on_ok(self, result):
        if "report" in result._task.tags:
            lines = result._result.get("stdout", "").splitlines()
            name = result._host.get_name()
            self._display.display("\n".join(f"{name}: {line}" for line in lines or ["nothing"]))

    def v2_runner_on_failed(self, result, ignore_errors=False):
        if not ignore_errors:
            self.failed[result._host.get_name()] = f"{result._task.get_name()}: {reason(result._result)}"

    def v2_runner_on_unreachable(self, result):
        self.failed[result._host.get_name()] = f"not reached: {reason(result._result)}"

    def v2_playbook_on_stats(self, stats):
        for host in sorted(self.failed):
            self._display.display(f"{host} FAILED: {self.failed[host]}", color="red")
