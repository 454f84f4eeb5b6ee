//! containerd's Sandbox service: requests in, answers out, nothing decided.
//!
//! Contract: as in `service.rs`, what changes something runs to its end even if the caller hangs up meanwhile.
//! Spec: containerd, api/runtime/sandbox/v1; the states are the CRI's, which containerd passes on.

use std::{
    env::consts,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api as api,
    sandbox_async::Sandbox,
    ttrpc::{self, r#async::TtrpcContext},
};
use serde_json::json;

use super::{
    info::RUNTIME,
    metrics::metrics,
    process::{Ended, timestamp},
    tasks::{Tasks, held::Held},
};
use crate::cgroup::is_v2;

/// The CRI's `PodSandboxState`.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service.
pub(super) struct Sandboxes(pub(super) Arc<Tasks>);

#[async_trait]
impl Sandbox for Sandboxes {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        self.0
            .run(async move |tasks: Arc<Tasks>| tasks.create_sandbox(request).await)
            .await?;
        Ok(api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let since = self
            .0
            .run(async move |tasks: Arc<Tasks>| tasks.start_sandbox(&request.sandbox_id).await)
            .await?;
        Ok(api::StartSandboxResponse {
            pid: self.0.pid(),
            created_at: Some(timestamp(since)).into(),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        let mut response = api::PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = go_architecture(consts::ARCH).to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        let patience = Some(request.timeout_secs)
            .filter(|&seconds| seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into()));
        self.0
            .run(async move |tasks: Arc<Tasks>| {
                tasks.stop_sandbox(&request.sandbox_id, patience).await
            })
            .await?;
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        self.0.heard();
        let Ended { status, at } = self.0.sandbox(&request.sandbox_id)?.init.wait().await;
        Ok(api::WaitSandboxResponse {
            exit_status: status.into(),
            exited_at: Some(timestamp(at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        self.0.heard();
        let held = self.0.sandbox(&request.sandbox_id)?;
        Ok(status(&held, self.0.pid(), request.verbose))
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        self.0.heard();
        self.0.ping_sandbox(&request.sandbox_id)?;
        Ok(api::PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.0
            .run(async move |tasks: Arc<Tasks>| tasks.shut_sandbox_down(&request.sandbox_id).await)
            .await?;
        Ok(api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        let stats = self.0.sandbox_stats(&request.sandbox_id)?;
        let mut response = api::SandboxMetricsResponse::default();
        let told = response.metrics.mut_or_insert_default();
        told.timestamp = Some(timestamp(SystemTime::now())).into();
        told.id = request.sandbox_id;
        told.data = Some(metrics(&stats, is_v2())).into();
        Ok(response)
    }
}

fn status(held: &Held, pid: u32, verbose: bool) -> api::SandboxStatusResponse {
    let (started, ended) = (held.started.get(), held.init.ended());
    let (state, word) = match (started, ended) {
        (Some(_), None) => (READY, "running"),
        (_, Some(_)) => (NOT_READY, "stopped"),
        (None, None) => (NOT_READY, "created"),
    };
    let mut response = api::SandboxStatusResponse {
        sandbox_id: held.id.clone(),
        pid: if state == READY { pid } else { 0 },
        state: state.to_owned(),
        created_at: started.map(|&since| timestamp(since)).into(),
        exited_at: ended.map(|ended| timestamp(ended.at)).into(),
        ..Default::default()
    };
    if verbose {
        // The words of containerd's own sandboxer, which crictl shows.
        let info = json!({
            "pid": response.pid,
            "processStatus": word,
            "runtimeType": RUNTIME,
            "runtimeSpec": held.spec(),
        });
        response.info.insert("info".to_owned(), info.to_string());
    }
    response
}

/// An architecture's name in images and in Go.
fn go_architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
