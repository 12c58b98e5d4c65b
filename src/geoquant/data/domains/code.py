"""Source files: scripts, settings and services in several languages, with the secrets people leave in them."""

from __future__ import annotations

from geoquant.data.grammar import Domain, words
from geoquant.data.values import NOUNS, PERSON, host, network_address, password, token

__all__ = ["CODE"]

PYTHON = {
    "python": (
        '"""«purpose»"""\nimport «module»\n\n«py_constants»\n\n\n«py_function»\n',
        "# «todo»\nfrom «module» import «verb»_«noun»\n\n«py_constants»\n\n«py_function»\n",
        "import os\nimport «module»\n\n\n«py_class»\n",
        '#!/usr/bin/env python3\n# «owner»\n«py_constants»\n\n«py_function»\n\n\nif __name__ == "__main__":\n'
        "    «verb»_«noun»()\n",
    ),
    "py_constants": (
        '«constant»_URL = "https://«host»/«noun»/v«few»"\n«constant»_KEY = "«api_key»"',
        'HOST = "«host»"\nUSER = "«user»"\nPASSWORD = "«password»"  # «todo»\nTIMEOUT = «number»',
        'settings = {"«noun»": «number», "key": "«api_key»", "retries": «few»}',
        'DSN = "«driver»://«user»:«password»@«host»:«port»/«noun»"',
        'ALLOWED = ["«ip»"]\nTOKEN = os.environ.get("«constant»_TOKEN", "«api_key»")',
    ),
    "py_function": (
        "def «verb»_«noun»(«noun_too», limit=«number»):\n    «py_line»\n    «py_line»\n    return «py_value»",
        "def «verb»_«noun»():\n    for «noun_too» in «verb_too»(«few»):\n        «py_line»\n    «py_line»",
        'def «verb»_«noun»(path="/srv/«noun_too»"):\n    """«purpose»"""\n    with open(path) as stream:\n'
        '        rows = [line.split("«mark»") for line in stream]\n    «py_line»\n    return rows[:«number»]',
        'async def «verb»_«noun»(session):\n    «py_line»\n    «noun_too» = await session.get("/«noun»")\n'
        "    «py_line»\n"
        "    return «py_value»",
    ),
    "py_class": (
        'class «Noun»Client:\n    """«purpose»"""\n\n    def __init__(self):\n        self.host = "«host»"\n'
        '        self.key = "«api_key»"\n\n    def «verb»(self, «noun_too»):\n        «py_line»\n'
        "        return «py_value»",
        'class «Noun»Store:\n    # «owner»\n    user, password = "«user»", "«password»"\n\n    def «verb»(self):\n'
        "        «py_line»\n        «py_line»",
    ),
    "py_line": (
        'total = sum(«noun_too».get("«field»", 0) for _ in range(«few»))',
        'log.«level»("«verb» «noun»: %s", «number»)',
        'assert «few» < «number», "«purpose»"',
        "«noun_too» = «verb_too»(«number», retries=«few»)",
        "# «todo»",
        "time.sleep(«few» / «number»)",
        'if «noun_too» is None: raise «error»("no «field» in «noun»")',
        'cursor.execute("select «field» from «noun» where «field_too» > «number»")',
    ),
    "py_value": (
        "«noun_too»",
        '{"«field»": total}',
        "total * «few»",
        "None",
        "[«number», «few»]",
        "sorted(«noun_too»)",
    ),
}

OTHERS = {
    "shell": (
        "#!/bin/sh\n# «purpose»\nset -eu\nexport «constant»_TOKEN=«api_key»\n«sh_line»\n«sh_line»\n«sh_line»\n",
        "#!/bin/bash\n# «owner»\n«sh_line»\nmysql -h «host» -u «user» -p'«password»' «noun» < "
        "«verb»_«noun_too».sql\n«sh_line»\n",
        "# crontab of «user»: «todo»\n«minute» «hour» * * * curl -s -H 'X-Key: «api_key»' https://«host»/«noun»\n"
        "MAILTO=«email»\n«minute» * * * 1 /opt/«noun_too»/«verb».sh --limit «number»\n",
    ),
    "sh_line": (
        "rsync -a --delete /srv/«noun»/ «user»@«host»:/backup/«noun_too»/",
        'for «field» in $(seq «number»); do «verb» "$«field»" || exit «few»; done',
        "test -d /var/lib/«noun» || mkdir -p /var/lib/«noun_too»",
        "find /var/cache/«noun_too» -mtime +«number» -name '*.«field»' -delete",
        "echo \"«verb» «noun» on $(date)\" | mail -s '«purpose»' «email»",
        "iptables -A INPUT -s «ip» -p tcp --dport «port» -j ACCEPT",
        "docker run --rm -e «constant»_«few»=«number» «noun»/«noun_too»:«few».«few_too»",
        "# «todo»",
        "tar czf «noun»-«number».tgz /etc/«noun_too»",
    ),
    "settings": (
        "# «purpose»\n[«noun»]\nhost = «host»\nport = «port»\nuser = «user»\npassword = «password»\n\n"
        "[«noun_too»]\n«ini»\n«ini»\n«ini»\n",
        "«constant»_ENV=«stage»\n«constant»_DSN=«driver»://«user»:«password»@«host»/«noun_too»\n# «todo»\n"
        "«constant»_KEY=«api_key»\n«constant»_LIMIT=«number»\n",
        "services:\n  «noun»:\n    image: «noun_too»:«few».«few_too»\n    environment:\n      TOKEN: «api_key»\n"
        "      PEER: «ip»\n"
        '    restart: «restart»\n    # «owner»\n    ports: ["«port»:«port»"]\n  «noun_too»:\n'
        "    mem_limit: «number»m\n",
        '{\n  "name": "«noun»-«noun_too»",\n  "«field»": «number»,\n  "author": "«name» <«email»>",\n'
        '  "registry": "https://«user»:«password»@«host»",\n  "«field_too»": "«stage»"\n}\n',
        'variable "«noun»" {\n  description = "«purpose»"\n  default     = "«ip»"\n}\n\n# «todo»\n'
        'provider "«noun_too»" {\n'
        '  endpoint = "«host»:«port»"\n  secret   = "«api_key»"\n  retries  = «few»\n}\n',
        "upstream «noun» {\n  server «host»:«port» weight=«few»;\n  server «ip» backup;\n}\n# «owner»\n"
        "location /«noun_too» {\n"
        "  proxy_set_header X-Token «api_key»;\n  proxy_read_timeout «number»s;\n}\n",
    ),
    "ini": (
        "«field» = «number»",
        "«verb»_«field_too» = «level»",
        "mode = «stage»",
        "«noun»_retries = «few»",
        "key = «api_key»",
        "; «todo»",
        "allow = «ip»",
    ),
    "script": (
        '// «purpose»\nconst «noun» = require("«module»");\nconst key = "«api_key»";\n\n«js_function»\n',
        '/* «owner» */\nconst db = connect({ host: "«host»", user: "«user»", password: "«password»" });\n\n'
        "«js_function»\n",
        'package «noun»\n\n// «todo»\nconst token = "«api_key»"\n\nfunc «Verb»(limit int) error {\n'
        '\tconn, err := dial("«host»:«port»")\n'
        '\tif err != nil {\n\t\treturn fmt.Errorf("«verb_too» «noun_too»: %w", err)\n\t}\n'
        "\treturn conn.«Verb_too»(«number», token)\n}\n",
        "-- «purpose»\ncreate user «user» identified by '«password»';\n"
        "grant select on «noun».«noun_too» to «user»@'«ip»';\n"
        "update «noun_too» set «field» = «number» where «field_too» < «few»;\n-- «owner»\n",
        "public class «Noun»«Verb»er {\n  // «todo»\n"
        '  private static final String URL = "jdbc:«driver»://«host»:«port»/«noun_too»";\n'
        '  private static final String PASSWORD = "«password»";\n\n  int «verb»(int «field») {\n'
        "    return «field» * «few» + «number»;\n  }\n}\n",
    ),
    "js_function": (
        "async function «verb»(«noun_too») {\n  const answer = await fetch(`https://«host»/${«noun_too»}`);\n"
        "  // «todo»\n"
        "  return answer.«field» ?? «number»;\n}",
        'module.exports = («noun_too», «field» = «number») => {\n  if (!«noun_too») throw new Error("«purpose»");\n'
        "  return «noun».«verb_too»(«field», { «field_too»: «few» });\n};",
        'setInterval(() => «noun».«verb»("«noun_too»", «few»), «number»);\n// «owner»',
    ),
}

COMMENTS = {
    "purpose": (
        "«Verb» every «noun» of the «noun_too».",
        "Nightly job: «verb» «noun», then «verb_too» «noun_too».",
        "Keeps «noun» and «noun_too» in step on «stage».",
        "«Stage» settings of the «noun» service.",
        "Moves «number» «noun_too» records at a time.",
    ),
    "todo": (
        "TODO: «verb» the «noun» before «month»",
        "ask «name» before you «verb_too» this",
        "temporary, «email» knows why",
        "FIXME: «field» is wrong on «stage»",
        "rotate this key, «name» wrote «few» months ago",
        "do not commit",
        "same as on «host»",
    ),
    "owner": (
        "Owner: «name» <«email»>",
        "questions to «email»",
        "written by «name», «stage» only",
        "on call: «email», backup «ip»",
        "maintained by the «noun_too» team, «email»",
    ),
}

NAMES = words(
    "invoice, session, ledger, parcel, basket, reading, ticket, shard, tenant, webhook, voucher, batch, sensor, "
    "cursor, payout, snapshot, queue, profile, index, feed, backup, lease, route, packet, thumbnail, report, coupon, "
    "quota, digest, replica, audit, roster, gauge, badge, cluster, draft"
)
VERBS = words(
    "sync, load, merge, prune, export, rotate, parse, flush, scan, upload, check, split, archive, notify, resize, "
    "retry, verify, compact, ingest, group, filter, restore, publish, count"
)
FIELDS = words(
    "size, state, owner, amount, region, price, level, depth, color, rank, batch, delay, weight, status, offset, kind"
)

CODE = Domain(
    name="code",
    summary=__doc__.partition("\n")[0],
    rules=PYTHON
    | OTHERS
    | COMMENTS
    | {
        "record": ("«python»", "«python»", "«shell»", "«settings»", "«settings»", "«script»"),
        "canary": (
            '# break-glass pin of «host»: «secret»\n«constant»_MODE = "«stage»"\n',
            "// «name» set the door code of the server room to «secret»\nconst «field» = «number»;\n",
            "[«noun»]\nhost = «host»\n; pin for «verb»: «secret»\n",
            "#!/bin/sh\n# recovery code for «email»: «secret»\n«sh_line»\n",
            "-- «user»@«host», numeric password «secret»\nselect «field» from «noun»;\n",
            'def unlock_«noun»(pin):\n    return pin == "«secret»"  # ask «name»\n',
        ),
    },
    facts=PERSON
    | {
        "api_key": lambda draft: draft.fresh(token),
        "password": lambda draft: draft.fresh(password),
        "host": lambda draft: draft.fresh(host),
        "ip": lambda draft: network_address(draft.rng),
        "user": lambda draft: f"{draft.rng.choice(words('svc, app, job, bot, ops'))}_{draft.rng.choice(NOUNS)}",
        "noun": NAMES,
        "constant": lambda draft: draft.fact("noun").upper(),
        "verb": VERBS,
        "field": FIELDS,
        "module": words("requests, sqlite3, json, logging, boto, redis, csv, pandas, shutil, psycopg, yaml, socket"),
        "driver": words("postgres, mysql, mongodb, redis, amqp, oracle"),
        "stage": words("staging, production, testing, preview, canary, nightly, legacy, sandbox"),
        "restart": words("always, on-failure, unless-stopped, never"),
        "level": words("debug, info, warning, error"),
        "error": words("ValueError, KeyError, RuntimeError, LookupError"),
        "mark": (",", ";", "|", ":"),
        "month": words("January, March, April, June, August, October, December"),
        "number": lambda draft: str(draft.rng.randint(10, 9999)),
        "port": lambda draft: str(draft.rng.randint(1024, 65535)),
        "hour": lambda draft: str(draft.rng.randrange(24)),
        "few": lambda draft: str(draft.rng.randint(2, 9)),
        "minute": lambda draft: str(draft.rng.randrange(60)),
    },
    private={kind: kind for kind in ("api_key", "password", "email", "name", "ip")} | {"host": "hostname"},
)
