"""A report page taken apart."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Sections' text, exact values, tables, ids and references; fails on tags left open."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.refs, self.tags = [], [], [], []
        self.values, self.keyed, self.text, self.tables, self.title = {}, {}, {}, {}, ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def place(self, kind):
        return next((i for t, i in reversed(self.open) if t == kind and i), "")

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.refs += re.findall(r"url\(#([^)]*)\)", " ".join(v or "" for v in attrs.values()))
        self.refs += [v[1:] for k, v in attrs.items() if k == "xlink:href" and v[0] == "#"]
        if tag == "tr":
            self.tables.setdefault(self.place("section"), []).append([])
        if tag in ("td", "th"):
            self.tables[self.place("section")][-1].append("")
        if "data-value" in attrs:
            self.values.setdefault(self.place("section"), []).append(float(attrs["data-value"]))
            key = next((k for k in map(self.key_of, reversed(self.open)) if k), None)
            if key:
                self.keyed[key] = float(attrs["data-value"])
        if tag not in VOID:
            self.open.append((tag, attrs.get("id") or attrs.get("data-key", "")))

    @staticmethod
    def key_of(entry):
        return entry[1] if entry[0] in ("div", "b") else None

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        last = self.open.pop()[0]
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data):
        section = self.place("section")
        self.text[section] = self.text.get(section, "") + data
        kinds = [t for t, _ in self.open]
        if kinds and kinds[-1] == "title" and "svg" not in kinds:
            self.title += data
        if "td" in kinds or "th" in kinds:
            self.tables[section][-1][-1] += data
