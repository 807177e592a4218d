"""For authors of plugins, and for Interlace's own tests: fakes, harnesses and suites. Public API.

    harness           EngineHarness: an engine core over a scripted executor, step by step, everything checked
    executor          ScriptedExecutor: known tokens, scripted failures, no model; also by name in a spec
    checked_worker    CheckedWorker: carries out plans and trusts nothing
    histories         run_history: random traffic, faults and aborts from one seed
    scheduler_suite   SchedulerSuite: subclass it in five lines to test a scheduling policy
    adversaries       policies that do everything wrong, which the core survives
    overhead          what the engine itself costs per step: python -m interlace.testing.overhead
    fakes             ScriptedClient: an engine client with known answers, for what surrounds the engine
    model_harness     ModelHarness: a model over a paged cache, without an engine

Nothing is imported here, so that a test pays only for what it uses.
"""
