"""Reads the archive of an offline experiment of Comet."""

import json
import zipfile


class Archive:
    """What is in it: key, project, workspace, name, graph, metrics, images, …"""

    def __init__(self, path):
        self.metrics = {}  # name: [(step, epoch, value), ...] as logged
        self.params = {}
        self.images = {}  # name: data, the last one logged
        self.files = {}  # name, or kind of upload: data
        self.name = self.graph = None
        self.output = ""  # the console's
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("experiment.json"))
            self.key, self.project = about["offline_id"], about["project_name"]
            self.workspace = about["workspace"]
            for line in archive.read("messages.json").decode().splitlines():
                message = json.loads(line)
                self.take(archive, message["type"], message["payload"])

    def take(self, archive, kind, content):
        """Take one of the archive's messages."""
        if kind == "metric_msg":
            metric = content["metric"]
            entry = metric["step"], metric["epoch"], float(metric["metricValue"])
            self.metrics.setdefault(metric["metricName"], []).append(entry)
        elif kind == "parameter_msg":
            self.params[content["param"]["paramName"]] = content["param"]["paramValue"]
        elif kind == "log_other" and content["key"] == "Name":
            self.name = content["value"]
        elif kind == "graph":
            self.graph = content["graph"]
        elif kind == "standard_output":
            self.output += content["output"]
        elif kind == "file_upload":
            data = archive.read(content["file_path"])
            about = content["additional_params"] or {}
            if content["upload_type"] == "visualization":
                self.images[about["figName"]] = data
            else:
                self.files[about.get("fileName") or content["upload_type"]] = data
