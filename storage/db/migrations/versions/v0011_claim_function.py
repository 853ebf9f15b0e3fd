"""
On Postgres, the plain claim as a function, and the end of a job with the next claim as another.

Additive. What a claim does in five to eight round trips is one. The functions do nothing where a claim is not
plain, and say so by a row of NULLs; storage/db/store/claim.py then takes it statement by statement, and
storage/db/store/scheduling.py defines the order. A later version that changes them creates functions of other
names, because workers of this version go on calling these.
"""

from alembic import op

revision = "0011"
down_revision = "0010"

NOW = "extract(epoch FROM clock_timestamp())::double precision"
CLAIMABLE = (
    "state = 'queued' AND held = 0 AND blockers = 0 AND not_before IS NULL"
    " AND kind = ANY (of_kinds) AND spec_version <= newest_spec"
)
NEXT_USER = f"""
    SELECT "user" FROM job WHERE {CLAIMABLE} AND job.queue = {{queue}} AND priority = level
    {{after}} ORDER BY "user" LIMIT 1"""
PLANS = "SET plan_cache_mode = force_generic_plan SET enable_bitmapscan = off"
"""As OF_WORKERS in storage/db/postgres.py, also behind a pooler that drops the settings of a session."""


def event(type: str, of: str) -> str:
    """Return the statement that records an event of the row `of`, not before the job's last one."""
    return f"""
    INSERT INTO event (job_id, at, type, attempt, worker) VALUES ({of}.id,
        greatest({NOW}, (SELECT at FROM event WHERE job_id = {of}.id ORDER BY id DESC LIMIT 1)),
        '{type}', {of}.attempt, {of}.worker);"""


# The statements have a fresh snapshot each, as those of a transaction.
CLAIM = f"""
CREATE FUNCTION ganq_claim(
    of_queues text[], of_kinds text[], newest_spec integer, of_revision text, with_token text, by_worker text,
    by_host text, by_device text, by_boot_id text, by_pid integer, by_start_ticks bigint
) RETURNS SETOF job LANGUAGE plpgsql {PLANS} AS $$
#variable_conflict use_column
DECLARE
    level bigint := 2147483648;  -- above any priority
    waits record;
    claimed job;
BEGIN
    IF (SELECT version_num FROM alembic_version) IS DISTINCT FROM of_revision
        OR EXISTS (SELECT FROM quota)
        OR EXISTS (SELECT FROM job WHERE state = 'queued' AND not_before IS NOT NULL)
        OR EXISTS (SELECT FROM job WHERE state = 'queued' AND yielded_at IS NOT NULL)
    THEN
        RETURN NEXT claimed;
        RETURN;
    END IF;
    LOOP
        SELECT max(best.priority) INTO level
        FROM unnest(of_queues) AS mine (queue), LATERAL (
            SELECT priority FROM job WHERE {CLAIMABLE} AND job.queue = mine.queue AND priority < level
            ORDER BY priority DESC LIMIT 1
        ) AS best;
        EXIT WHEN level IS NULL;
        FOR waits IN
            WITH RECURSIVE waiting (queue, name) AS (
                SELECT mine.queue, ({NEXT_USER.format(queue="mine.queue", after="")})
                FROM unnest(of_queues) AS mine (queue)
                UNION ALL
                SELECT waiting.queue,
                    ({NEXT_USER.format(queue="waiting.queue", after='AND "user" > waiting.name')})
                FROM waiting WHERE waiting.name IS NOT NULL
            ),
            several AS (SELECT count(DISTINCT name) > 1 AS users FROM waiting),
            busy AS (
                SELECT "user", count(*) AS jobs FROM job
                WHERE state = 'running' AND (SELECT users FROM several) GROUP BY "user"
            )
            SELECT waiting.queue, waiting.name, (SELECT users FROM several) AS rotates
            FROM waiting
            LEFT JOIN busy ON busy."user" = waiting.name LEFT JOIN share ON share."user" = waiting.name
            WHERE waiting.name IS NOT NULL
            ORDER BY coalesce(busy.jobs, 0), coalesce(share.served_at, 0), waiting.name, (
                SELECT id FROM job WHERE {CLAIMABLE} AND job.queue = waiting.queue AND priority = level
                AND "user" = waiting.name ORDER BY position, id LIMIT 1
            )
        LOOP
            UPDATE job SET state = 'running', attempt = attempt + 1, lease_token = with_token,
                worker = by_worker, hb_seq = hb_seq + 1, started_at = coalesce(started_at, {NOW}),
                error_code = NULL, error_message = NULL, error_hint = NULL
            WHERE state = 'queued' AND id = (
                SELECT id FROM job WHERE {CLAIMABLE} AND job.queue = waits.queue AND priority = level
                AND "user" = waits.name ORDER BY position, id LIMIT 1 FOR UPDATE SKIP LOCKED
            )
            RETURNING * INTO claimed;
            CONTINUE WHEN NOT FOUND;  -- other workers are claiming the jobs of this user
            INSERT INTO attempt (
                job_id, number, started_at, lease_token, worker, host, device, boot_id, pid, start_ticks
            ) VALUES (
                claimed.id, claimed.attempt, {NOW}, with_token, by_worker,
                by_host, by_device, by_boot_id, by_pid, by_start_ticks
            );{event("claimed", "claimed")}
            IF waits.rotates THEN
                -- Later than any other, even if clocks differ. A row that is locked is just being marked by
                -- another claim; to wait for its commit would have all claims of this user follow each other.
                INSERT INTO share ("user", served_at) VALUES (waits.name, 0) ON CONFLICT ("user") DO NOTHING;
                UPDATE share SET served_at = greatest({NOW}, (SELECT max(served_at) FROM share) + 0.001)
                WHERE "user" = (SELECT "user" FROM share WHERE "user" = waits.name FOR UPDATE SKIP LOCKED);
            END IF;
            RETURN NEXT claimed;
            RETURN;
        END LOOP;
    END LOOP;
END $$"""

SUCCEED_AND_CLAIM = f"""
CREATE FUNCTION ganq_succeed_and_claim(
    of_job bigint, of_attempt integer, of_token text, new_result json, is_bit_exact integer,
    more_s double precision, of_queues text[], of_kinds text[], newest_spec integer, of_revision text,
    with_token text, by_worker text, by_host text, by_device text, by_boot_id text, by_pid integer,
    by_start_ticks bigint
) RETURNS SETOF job LANGUAGE plpgsql {PLANS} AS $$
#variable_conflict use_column
DECLARE
    ended record;
    nothing job;
BEGIN
    SELECT id, attempt, worker, sweep IS NOT NULL AND max_running IS NOT NULL AS throttles INTO ended FROM job
    WHERE id = of_job AND state = 'running' AND attempt = of_attempt AND lease_token = of_token FOR UPDATE;
    -- Whoever begins to wait for this job locks its row first, and is seen from here on.
    IF NOT FOUND OR ended.throttles
        OR EXISTS (SELECT FROM dependency WHERE needs = of_job)
        OR EXISTS (SELECT FROM end_dependency WHERE needs = of_job AND resolved = 0)
    THEN
        RETURN NEXT nothing;
        RETURN;
    END IF;
    UPDATE job SET state = 'succeeded', result = new_result, bit_exact = is_bit_exact,
        error_code = NULL, error_message = NULL, error_hint = NULL, preempt_for = NULL, yielded_at = NULL,
        ran_s = ran_s + more_s, finished_at = {NOW}
    WHERE id = of_job;
    UPDATE attempt SET ended_at = {NOW}, outcome = 'succeeded'
    WHERE job_id = of_job AND number = of_attempt AND ended_at IS NULL;{event("succeeded", "ended")}
    RETURN QUERY SELECT * FROM ganq_claim(
        of_queues, of_kinds, newest_spec, of_revision, with_token, by_worker,
        by_host, by_device, by_boot_id, by_pid, by_start_ticks
    ) AS taken WHERE taken.id IS NOT NULL;
END $$"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(CLAIM)
        op.get_bind().exec_driver_sql(SUCCEED_AND_CLAIM)
