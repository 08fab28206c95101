"""Tables and views of a store, and the steps that bring an older store forward.

Small tables carry keys. ``measurements``, the long table, has neither key nor index: a primary key quadruples its size
and slows appends (measured on a million rows). It refers to ``analyses`` by a small integer, not by the hash.
"""

from __future__ import annotations

SCHEMA_VERSION = 2

# Files are written so that every DuckDB from this version on can open them.
STORAGE_VERSION = "v1.4.0"

_TABLES = """
create table meta (key varchar primary key, value varchar not null);
create table runs (
  run varchar primary key, source varchar not null, model_type varchar, created_at timestamp not null);
create table requests (
  run varchar not null, evaluation_set varchar not null, dtype varchar not null, seed bigint not null,
  model_factory varchar not null, blocks varchar not null, options json not null, asked_at timestamp not null,
  primary key (run, evaluation_set, dtype, seed, model_factory, blocks));
create table checkpoints (
  checkpoint_id varchar primary key, run varchar not null, checkpoint varchar not null, step bigint,
  tokens_seen bigint, stage varchar, epoch double, layout varchar not null, location varchar not null,
  revision varchar, state varchar not null, reason varchar, fingerprint varchar, size_bytes bigint,
  duplicate_of bigint);
create table evaluation_sets (
  hash varchar primary key, name varchar not null, path varchar not null, n_examples bigint not null,
  n_tokens bigint not null, tokenizer_hash varchar, objective varchar, source varchar, licence varchar);
create table analyses (
  analysis integer primary key, analysis_id varchar unique not null, fingerprint varchar not null,
  analyzer varchar not null, analyzer_version varchar not null, params json not null,
  evaluation_set varchar not null, dtype varchar not null, seed bigint not null, status varchar not null,
  message varchar, seconds double, device varchar, versions json, sequence bigint not null,
  finished_at timestamp not null);
create table planned (
  checkpoint_id varchar not null, analysis_id varchar not null, fingerprint varchar not null,
  analyzer varchar not null, analyzer_version varchar not null, params json not null,
  evaluation_set varchar not null, dtype varchar not null, seed bigint not null, planned_at timestamp not null,
  primary key (checkpoint_id, analysis_id));
create table measurements (
  analysis integer not null, layer smallint, component varchar, task varchar, label varchar,
  metric varchar not null, value double, stderr double, n bigint, reason varchar);
create table array_values (
  analysis integer not null, layer smallint, component varchar, task varchar, label varchar,
  name varchar not null, "values" double[] not null);
create table artifacts (
  analysis integer not null, name varchar not null, path varchar not null, sha256 varchar not null);
create table fingerprints (
  path varchar not null, size bigint not null, mtime_ns bigint not null, digest varchar not null,
  primary key (path, size, mtime_ns));
"""

# Found by ``trace-offline events``: no key, replaced as a whole for the series that are looked at again.
_EVENTS = """
create table events (
  run varchar not null, analyzer varchar not null, task varchar, label varchar, layer smallint, component varchar,
  metric varchar not null, kind varchar not null, step bigint not null, step_low bigint not null,
  step_high bigint not null, detail json not null, evaluation_set varchar not null);
"""

# ``is_latest`` belongs to the weights a checkpoint has now: when the files of a step were replaced, what was measured
# on the old ones stays queryable but is no longer the latest word. Imported numbers know no weights (they have the
# fingerprint "imported:PART:DIGEST"); each part of a file, a task, has a latest word of its own.
_VIEWS = """
create or replace view linked as
select p.checkpoint_id, c.run, c.step, c.tokens_seen, c.checkpoint, e.name as evaluation_set, a.analysis, a.analysis_id,
  a.analyzer, a.analyzer_version, a.params, a.status, a.message, a.seconds, a.device, a.dtype, a.seed, a.finished_at,
  coalesce(a.status = 'ok' and (a.fingerprint = c.fingerprint or starts_with(a.fingerprint, 'imported:'))
    and a.sequence = max(a.sequence)
    filter (where a.status = 'ok' and (a.fingerprint = c.fingerprint or starts_with(a.fingerprint, 'imported:')))
    over (partition by p.checkpoint_id, a.evaluation_set, a.analyzer,
      case when starts_with(a.fingerprint, 'imported:') then split_part(a.fingerprint, ':', 2) end), false) as is_latest
from planned p
join analyses a using (analysis_id)
join checkpoints c using (checkpoint_id)
join evaluation_sets e on e.hash = a.evaluation_set;

create or replace view history as
select l.run, l.step, l.tokens_seen, l.checkpoint, l.evaluation_set, l.analyzer, l.analyzer_version, l.params,
  m.layer, m.component, m.task, m.label, m.metric, m.value, m.stderr, m.n, l.is_latest, l.analysis_id, m.reason
from measurements m join linked l on l.analysis = m.analysis;

create or replace view arrays as
select l.analysis_id, l.run, l.step, l.analyzer, v.layer, v.component, v.task, v.label, v.name, v."values", l.is_latest
from array_values v join linked l on l.analysis = v.analysis;

create or replace view status as
select c.run, c.step, c.checkpoint, e.name as evaluation_set, p.analyzer, p.analyzer_version, p.params,
  coalesce(a.status, 'planned') as status, a.message, a.seconds, a.device, a.finished_at, p.analysis_id
from planned p
join checkpoints c using (checkpoint_id)
left join analyses a using (analysis_id)
left join evaluation_sets e on e.hash = p.evaluation_set
where p.fingerprint = c.fingerprint or starts_with(p.fingerprint, 'imported:');
"""

CREATE = _TABLES + _EVENTS + _VIEWS

# version → statements that turn a store of that version into the next one. Forward only.
MIGRATIONS: dict[int, str] = {1: _EVENTS + _VIEWS}

PUBLIC_VIEWS = (
    "history", "arrays", "events", "status", "runs", "checkpoints", "evaluation_sets", "analyses", "artifacts",
)  # fmt: skip
