// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/e2e"
)

func newE2ECommand() *cobra.Command {
	plan := e2e.Plan{Run: runName(), Modes: []string{"iptables", "nftables", "ebpf", "ipvs"}, Runs: 1, Processes: 6 * runtime.NumCPU()}
	var families []string
	for _, family := range clusters.IPFamilies() {
		families = append(families, string(family))
	}
	cmd := &cobra.Command{
		Use:   "e2e",
		Short: "run Kubernetes' own tests of Services against kind clusters of each mode, and put the outcomes side by side",
		Long: "E2e makes a kind cluster of seven nodes for each mode and family, one after another, runs the specs of Kubernetes' end-to-end tests there\n" +
			"that test Services, and writes " + e2e.TableFile + " and a page with the tables side by side. Given the folder of a run that was cut off, it does\n" +
			"what is left. make e2e builds what it needs.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, word := range families {
				plan.Families = append(plan.Families, clusters.IPFamily(word))
			}
			return runE2E(cmd.Context(), plan, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&plan.Modes, "modes", plan.Modes, "modes to test, in this order; what this host or kind cannot carry is skipped, with the reason")
	f.StringSliceVar(&families, "families", families, "families of addresses of the clusters that each mode has")
	f.StringVar(&plan.Focus, "focus", "", "regular expression of the names of specs (default those that test Services)")
	f.BoolVar(&plan.Slow, "slow", false, "add specs that are slow, and those that disturb a cluster")
	f.IntVar(&plan.Runs, "runs", plan.Runs, "how many times each spec is run in each cluster")
	f.IntVar(&plan.Processes, "processes", plan.Processes, "specs that run at a time, where they may")
	f.StringVar(&plan.Out, "out", "", "folder for the results, or of a run that was cut off (default results/runs/e2e)")
	f.StringVar(&plan.Bin, "bin", "", "folder with e2e.test and ginkgo (default the one that this program lies in)")
	f.StringVar(&plan.Cache, "cache", "", "folder of the images (default "+defaultCache+")")
	f.StringVar(&plan.NodeImage, "node-image", kind.OwnImage, "image of kind's nodes; the default is of the Kubernetes that the specs are of, and make node-image makes it")
	return cmd
}

func runE2E(ctx context.Context, plan e2e.Plan, stdout, stderr io.Writer) (err error) {
	switch {
	case len(plan.Modes) == 0 || len(plan.Families) == 0:
		return errors.New("--modes and --families: at least one of each")
	case twice(plan.Modes):
		return fmt.Errorf("--modes %v: a mode is named twice", plan.Modes)
	case twice(plan.Families):
		return fmt.Errorf("--families %v: one is named twice", plan.Families)
	case plan.Runs < 1 || plan.Processes < 1:
		return errors.New("--runs and --processes are at least 1")
	}
	for _, family := range plan.Families {
		if !slices.Contains(clusters.IPFamilies(), family) {
			return fmt.Errorf("--families: %q is none of %v", family, clusters.IPFamilies())
		}
	}
	for _, name := range plan.Modes {
		mode, err := dataplane.Find(name)
		if err != nil {
			return err
		}
		if mode.Floor() == "" {
			return fmt.Errorf("--modes: nothing carries Services in mode %s", name)
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("kind's nodes are entered by their processes: run it as root (sudo)")
	}
	if err := findFolders(&plan.Bin, &plan.Cache); err != nil {
		return err
	}
	if plan.Out == "" {
		plan.Out = filepath.Join("results", "runs", "e2e")
	}
	if err := ofE2E(plan.Out); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	if err := results.MakeDir(plan.Out); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	defer func() { err = errors.Join(err, giveBack(plan.Out)) }()
	plan.Environment = describeHost(ctx, plan.Bin)
	progress, err := newProgress(stderr, plan.Out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, progress.close()) }()
	if err := e2e.Run(ctx, plan, kind.Provider{}, progress); err != nil {
		return err
	}
	fmt.Fprintln(stdout, filepath.Join(plan.Out, e2e.PageFile))
	return nil
}

// ofE2E refuses a folder that holds something else than results of such runs: all in it is handed to the user who called sudo.
func ofE2E(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		// A file that was being written when its run was killed has a dot, and something after its name.
		of := func(file string) bool { return e.Name() == file || strings.HasPrefix(e.Name(), "."+file+".") }
		if _, err := dataplane.Find(e.Name()); err != nil && !slices.ContainsFunc([]string{e2e.TableFile, e2e.PageFile, logFile}, of) {
			return fmt.Errorf("%s holds %s, which is no result of this command: name another folder", dir, e.Name())
		}
	}
	return nil
}
