//! containerd's task service: requests in, answers out, nothing decided.
//!
//! Contract: what changes something runs to its end even if the caller hangs up meanwhile: containerd may be restarted at
//! any moment, and asks again afterwards.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    shim_async::Task,
    ttrpc::{self, r#async::TtrpcContext},
};

use super::{
    error::TaskError,
    info::RUNTIME,
    metrics::metrics,
    process::{Ended, timestamp},
    stdio::Paths,
    tasks::{Report, Tasks},
};
use crate::{cgroup::is_v2, sandbox::Event, state::Status};

/// The service.
pub(super) struct Service(pub(super) Arc<Tasks>);

#[async_trait]
impl Task for Service {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.0.heard();
        let report = self.0.report(&request.id, &request.exec_id).await?;
        Ok(state(report, self.0.pid()))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let pid = self
            .0
            .run(async move |tasks: Arc<Tasks>| tasks.create(request).await)
            .await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let started = self
            .0
            .run(async move |tasks: Arc<Tasks>| tasks.start(&request.id, &request.exec_id).await);
        Ok(api::StartResponse {
            pid: started.await?,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let deleted = self.0.run(
            async move |tasks: Arc<Tasks>| match request.exec_id.as_str() {
                "" => tasks.delete(&request.id).await,
                exec_id => tasks.delete_exec(&request.id, exec_id).await,
            },
        );
        let Ended { status, at } = deleted.await?;
        Ok(api::DeleteResponse {
            pid: self.0.pid(),
            exit_status: status.into(),
            exited_at: Some(timestamp(at)).into(),
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let pids = self.0.pids(&request.id).await?;
        let info = |pid| api::ProcessInfo {
            pid,
            ..Default::default()
        };
        Ok(api::PidsResponse {
            processes: pids.into_iter().map(info).collect(),
            ..Default::default()
        })
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: api::PauseRequest,
    ) -> ttrpc::Result<api::Empty> {
        let pause = async move |tasks: Arc<Tasks>| tasks.freeze(&request.id, Event::Pause).await;
        Ok(self.0.run(pause).await.map(done)?)
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: api::ResumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        let resume = async move |tasks: Arc<Tasks>| tasks.freeze(&request.id, Event::Resume).await;
        Ok(self.0.run(resume).await.map(done)?)
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        Err(TaskError::Unsupported("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let kill = async move |tasks: Arc<Tasks>| {
            let api::KillRequest {
                id,
                exec_id,
                signal,
                all,
                ..
            } = request;
            tasks.kill(&id, &exec_id, signal, all).await
        };
        Ok(self.0.run(kill).await.map(done)?)
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.0.heard();
        let spec = request.spec.into_option().unwrap_or_default().value;
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        Ok(self
            .0
            .exec(&request.id, &request.exec_id, paths, spec)
            .map(done)?)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let size = [request.height, request.width];
        let resized = self.0.resize(&request.id, &request.exec_id, size).await;
        Ok(resized.map(done)?)
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        if request.stdin {
            self.0.close_input(&request.id, &request.exec_id)?;
        }
        Ok(api::Empty::default())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        self.0.heard();
        let Ended { status, at } = self.0.wait(&request.id, &request.exec_id).await?;
        Ok(api::WaitResponse {
            exit_status: status.into(),
            exited_at: Some(timestamp(at)).into(),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.0.stats(&request.id).await?;
        Ok(api::StatsResponse {
            stats: Some(metrics(&stats, is_v2())).into(),
            ..Default::default()
        })
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let update = async move |tasks: Arc<Tasks>| {
            let resources = request.resources.into_option().unwrap_or_default();
            tasks.update(&request.id, &resources.value).await
        };
        Ok(self.0.run(update).await.map(done)?)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        self.0.heard();
        self.0.must_be_of_use(&request.id).await?;
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.pid(),
            version: RUNTIME.to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: api::ShutdownRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.0.shut_down();
        Ok(api::Empty::default())
    }
}

fn done((): ()) -> api::Empty {
    api::Empty::default()
}

fn state(report: Report, pid: u32) -> api::StateResponse {
    let Report {
        container,
        process,
        status,
    } = report;
    let ended = process.ended();
    let started = process.id.is_empty() || process.is_started();
    api::StateResponse {
        id: container.id.clone(),
        bundle: container.bundle.clone(),
        pid: if started { pid } else { 0 },
        status: in_words_of_containerd(status).into(),
        stdin: process.paths.stdin.clone(),
        stdout: process.paths.stdout.clone(),
        stderr: process.paths.stderr.clone(),
        terminal: process.paths.terminal,
        exit_status: ended.map_or(0, |ended| ended.status.into()),
        exited_at: ended.map(|ended| timestamp(ended.at)).into(),
        exec_id: process.id.clone(),
        ..Default::default()
    }
}

const fn in_words_of_containerd(status: Status) -> api::Status {
    match status {
        Status::Creating | Status::Created => api::Status::CREATED,
        Status::Running => api::Status::RUNNING,
        Status::Paused => api::Status::PAUSED,
        Status::Stopped => api::Status::STOPPED,
    }
}
