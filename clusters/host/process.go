// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// Command says what to start, and where.
type Command struct {
	// Name is what messages call it.
	Name string
	Argv []string
	// Env is the whole environment; nil keeps this program's.
	Env []string
	// NetNS is the network namespace to start in; nil is the host's.
	NetNS *clusters.NetNS
	// Cgroup is the cgroup2 folder to start in.
	Cgroup *Cgroup
	// Log receives standard error, and standard output unless Pipes is set. Its end is quoted when the process fails.
	Log string
	// Pipes connects standard input and output to the caller.
	Pipes bool
}

// Process is a running command.
type Process struct {
	Command
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *output
	done   chan struct{}
	err    error // set before done is closed
}

var _ clusters.Process = (*Process)(nil)

// Start starts c below the run's cgroup. The process dies with this one, whatever way that ends.
func (r *Run) Start(c Command) (*Process, error) {
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", c.Name, err)
	}
	defer log.Close()
	group, err := os.Open(c.Cgroup.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the cgroup of %s: %w", c.Name, err)
	}
	defer group.Close()

	p := &Process{Command: c, cmd: exec.Command(c.Argv[0], c.Argv[1:]...), done: make(chan struct{})}
	p.cmd.Env, p.cmd.Stderr, p.cmd.Stdout = c.Env, log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:   syscall.SIGKILL,
		UseCgroupFD: true,
		CgroupFD:    int(group.Fd()),
		// Subtle: a group of its own keeps Ctrl-C at the terminal from ending it before this program has said how.
		Setpgid: true,
	}
	if c.Pipes {
		p.cmd.Stdout = nil
		if p.stdin, err = p.cmd.StdinPipe(); err != nil {
			return nil, err
		}
		// Note: cmd.StdoutPipe was tried; Wait closes it while a reader may still want the last line.
		read, write, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		defer write.Close()
		p.cmd.Stdout, p.stdout = write, &output{File: read, process: p}
	}
	enter := func(f func() error) error { return f() }
	if c.NetNS != nil {
		enter = c.NetNS.Do
	}
	if err := enter(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", strings.Join(c.Argv, " "), err)
	}
	go func() {
		p.err = p.failure(p.cmd.Wait())
		close(p.done)
	}()
	return p, nil
}

// failure adds the command's line and its log's last line to the way in which it ended.
func (p *Process) failure(err error) error {
	end := "ended"
	if err != nil {
		end = err.Error()
	}
	return fmt.Errorf("%s (%s): %s%s", p.Name, strings.Join(p.Argv, " "), end, LogTail(p.Log))
}

// LogTail names a log and quotes its last line; empty when there is none.
func LogTail(path string) string {
	b, err := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if last := lines[len(lines)-1]; err == nil && last != "" {
		return fmt.Sprintf("; %s ends: %s", path, last)
	}
	return ""
}

// PID is the process's number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended; Err then says how.
func (p *Process) Done() <-chan struct{} { return p.done }

func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

func (p *Process) Stdin() io.WriteCloser { return p.stdin }

// Stdout is the process's output. When the process has ended, reading returns how in place of io.EOF.
func (p *Process) Stdout() io.Reader { return p.stdout }

// output is the reading end of a process's standard output.
type output struct {
	*os.File
	process *Process
}

// endLimit is how long a process whose output has ended may take to end; one that only closed its output lives on.
const endLimit = 2 * time.Second

func (o *output) Read(b []byte) (int, error) {
	n, err := o.File.Read(b)
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	select {
	case <-o.process.done:
		return n, o.process.err
	case <-time.After(endLimit):
		return n, err
	}
}

// Close closes the process's input, asks it to end, and kills it when it has not within five seconds.
func (p *Process) Close(ctx context.Context) error {
	if p.stdin != nil {
		p.stdin.Close()
	}
	if p.stdout != nil {
		defer p.stdout.Close()
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end %s: %w", p.Name, err)
	}
	t := time.NewTimer(5 * time.Second)
	defer t.Stop()
	select {
	case <-p.done:
		return nil
	case <-t.C:
	case <-ctx.Done():
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.Name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %s to end: %w", p.Name, ctx.Err())
	}
}
