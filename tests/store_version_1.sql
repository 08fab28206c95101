-- A store as schema version 1 made it, with two analyses; stores of that time must open for ever.
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

create or replace view linked as
select p.checkpoint_id, c.run, c.step, c.tokens_seen, c.checkpoint, e.name as evaluation_set, a.analysis, a.analysis_id,
  a.analyzer, a.analyzer_version, a.params, a.status, a.message, a.seconds, a.device, a.dtype, a.seed, a.finished_at,
  coalesce(a.status = 'ok' and a.fingerprint = c.fingerprint and a.sequence = max(a.sequence)
    filter (where a.status = 'ok' and a.fingerprint = c.fingerprint)
    over (partition by p.checkpoint_id, a.evaluation_set, a.analyzer), false) as is_latest
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
where p.fingerprint = c.fingerprint;

insert into meta values ('schema_version', '1');
insert into runs values ('old', 'somewhere', 'gpt_neox', timestamp '2026-01-01 00:00:00');
insert into evaluation_sets values ('e1', 'eval', 'eval', 3, 30, null, null, null, null);
insert into checkpoints values
  ('c0', 'old', 'step0', 0, null, null, null, 'hf_folder', 'run/step0', null, 'complete', null, 'f0', 1, null),
  ('c8', 'old', 'step8', 8, null, null, null, 'hf_folder', 'run/step8', null, 'complete', null, 'f8', 1, null);
insert into analyses values
  (1, 'a0', 'f0', 'loss', '1', '{}', 'e1', 'float32', 0, 'ok', null, 1.0, 'cpu', '{}', 1, timestamp '2026-01-01'),
  (2, 'a8', 'f8', 'loss', '1', '{}', 'e1', 'float32', 0, 'ok', null, 1.0, 'cpu', '{}', 2, timestamp '2026-01-01');
insert into planned values
  ('c0', 'a0', 'f0', 'loss', '1', '{}', 'e1', 'float32', 0, timestamp '2026-01-01'),
  ('c8', 'a8', 'f8', 'loss', '1', '{}', 'e1', 'float32', 0, timestamp '2026-01-01');
insert into measurements values
  (1, null, null, null, null, 'loss', 6.5, 0.25, 100, null), (2, null, null, null, null, 'loss', 3.5, 0.125, 100, null);
