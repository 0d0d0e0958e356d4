// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// acceptedFile is where accepted counts are kept, from the repository's root.
const acceptedFile = "scenarios/testdata/accepted.csv"

// acceptOptions are the flags of `plimsoll accept`.
type acceptOptions struct {
	file  string
	check bool
	plan  scenarios.Plan
	guest guestOptions
}

func newAcceptCommand() *cobra.Command {
	o := acceptOptions{plan: scenarios.AcceptedPlan()}
	cmd := &cobra.Command{
		Use:   "accept",
		Short: "count instructions in guests and accept the counts, which tests hold later ones to",
		Long: "Accept counts the instructions of connects in each mode at 10 and 1,000 Services, in guests, and writes them into a file in place of\n" +
			"those that were counted with the same kernel, QEMU and recipe. With --check it writes nothing: it is an error where counts differ\n" +
			"from the accepted ones, and a warning where none were accepted with this kernel, QEMU and recipe.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.file, "file", acceptedFile, "file of the accepted counts")
	f.BoolVar(&o.check, "check", false, "compare and write nothing")
	f.StringVar(&o.plan.Bin, "bin", "", "folder with kube-proxy (default the one that this program lies in)")
	f.StringVar(&o.plan.Cache, "cache", "", "folder of kernels and initramfs (default "+defaultCache+")")
	f.StringVar(&o.plan.Out, "out", "", "folder to keep the run in (default none)")
	o.guest.bind(f)
	return cmd
}

func (o *acceptOptions) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	accepted, err := scenarios.ReadAccepted(o.file)
	if err != nil {
		return err
	}
	if !o.check { // before minutes of counting
		if err := os.MkdirAll(filepath.Dir(o.file), 0o755); err != nil {
			return err
		}
	}
	if err := findFolders(&o.plan.Bin, &o.plan.Cache); err != nil {
		return err
	}
	if o.plan.Out == "" {
		if o.plan.Out, err = os.MkdirTemp("", "plimsoll-accept-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.plan.Out)) }()
	} else if err := makeOut(o.plan.Out); err != nil {
		return err
	}
	progress, err := newProgress(stderr, o.plan.Out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, progress.close()) }()
	g, err := o.prepare(ctx, accepted, progress)
	if err != nil {
		return err
	}
	env := describeHost(ctx, o.plan.Bin)
	env.Run, env.Start, env.Command = "accepted", time.Now(), os.Args
	if err := g.count(ctx, o.plan, o.guest, env, progress); err != nil {
		return err
	}
	run, err := results.Read(o.plan.Out)
	if err != nil {
		return err
	}
	counts, err := scenarios.TalliesOf(run.Records, scenarios.Stage{
		Kernel: g.machine.Kernel.Release, QEMU: g.qemu,
		Recipe: strings.Join([]string{g.machine.Recipe(), env.Versions["kubernetes"], env.Versions["iptables"], env.Versions["nft"]}, ", "),
	})
	if err != nil {
		return err
	}
	if !o.check {
		return scenarios.WriteAccepted(o.file, scenarios.Accept(accepted, counts))
	}
	lines, known := scenarios.Differences(accepted, counts)
	for _, line := range lines {
		fmt.Fprintln(stdout, line)
	}
	switch {
	case !known:
		progress.Warn(fmt.Sprintf("no counts are accepted in %s with %s: plimsoll accept accepts those above", o.file, counts[0].Stage))
		return nil
	case len(lines) > 0:
		return fmt.Errorf("%d counts of instructions differ from %s: if that is meant, plimsoll accept accepts the new ones", len(lines), o.file)
	}
	fmt.Fprintf(stdout, "%d counts of instructions are as accepted\n", len(counts))
	return nil
}

// prepare gets the newest kernel that counts were accepted with, where it can still be had.
func (o *acceptOptions) prepare(ctx context.Context, accepted []scenarios.Tally, report scenarios.Reporter) (guests, error) {
	if o.guest.kernel == "" && o.guest.pack == "" && len(accepted) > 0 {
		known := o.guest
		known.pack = guest.PackageOf(accepted[len(accepted)-1].Kernel)
		g, err := prepareGuests(ctx, known, o.plan, report)
		if err == nil || ctx.Err() != nil {
			return g, err
		}
		report.Warn(fmt.Sprintf("the kernel of the accepted counts cannot be had: %v", err))
	}
	return prepareGuests(ctx, o.guest, o.plan, report)
}
