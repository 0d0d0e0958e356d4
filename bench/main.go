// SPDX-License-Identifier: Apache-2.0

// Command plimsoll finds how many Services a node carries before latency, CPU or programming time sinks, for kube-proxy in
// each of its modes and for an embedded eBPF load balancer.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters/guest"
)

// version and commit are set by the linker.
var (
	version = "devel"
	commit  = ""
)

// Exit codes: 1 for an error, interrupted for a run that a signal ended (128 + SIGINT, as shells say it).
const interrupted = 130

// errInterrupted ends a run that a signal stopped.
var errInterrupted = errors.New("interrupted")

func main() {
	if guest.IsInit() {
		guest.Init(doCell)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		s := <-signals
		// A second signal ends the program at once; plimsoll clean then removes what is left.
		signal.Stop(signals)
		cancel(fmt.Errorf("%w by %s", errInterrupted, s))
	}()
	// Whoever reads our output may be gone first, as in `plimsoll run | tee log` and Ctrl-C. Left alone, the next line would
	// end the program in the middle of its clean-up. Subtle: the signal itself says nothing of the output once somebody is
	// notified of it, because a connection that the other side has closed raises it too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	gone := func() { cancel(fmt.Errorf("%w: nobody reads the output", errInterrupted)) }
	err := run(ctx, output{os.Stdout, gone}, output{os.Stderr, gone}, os.Args[1:])
	switch {
	case err == nil:
	case errors.Is(context.Cause(ctx), errInterrupted):
		fmt.Fprintln(os.Stderr, "plimsoll:", context.Cause(ctx))
		os.Exit(interrupted)
	default:
		// Several errors may be joined, each with a line of its own.
		fmt.Fprintln(os.Stderr, "plimsoll:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

// output is standard output or error; gone is called when nobody reads it any longer.
type output struct {
	file *os.File
	gone func()
}

func (o output) Fd() uintptr { return o.file.Fd() }

func (o output) Write(b []byte) (int, error) {
	n, err := o.file.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		o.gone()
	}
	return n, err
}

// run is the whole program but for the process around it.
func run(ctx context.Context, stdout, stderr io.Writer, args []string) error {
	root := &cobra.Command{
		Use:           "plimsoll",
		Short:         "find the load line of a Kubernetes Service dataplane",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(newRunCommand(), newReportCommand(), newCompareCommand(), newAcceptCommand(), newE2ECommand(), newListCommand(), newDoctorCommand(), newCleanCommand(),
		newAgentCommand(), newStatusCommand(), newDumpCommand(), newEngineCommand(), newEngineHoldCommand(), newPodServerCommand(), newPodClientCommand(), newPodWaitCommand())
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (%s --help lists the flags)", err, cmd.CommandPath())
	})
	return root.ExecuteContext(ctx)
}
