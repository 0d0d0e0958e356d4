// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/scenarios"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// somaxconn is the accept queue of servers in pods: more than the connects that any client makes in 5 ms.
const somaxconn = 65535

// newPodServerCommand is what backend pods run.
func newPodServerCommand() *cobra.Command {
	options := load.ServeOptions{Somaxconn: somaxconn}
	var listen, identify, datagram []string
	cmd := &cobra.Command{
		Use: scenarios.ServerCommand, Short: "the server of a backend pod", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, group := range []struct {
				words []string
				into  *[]netip.AddrPort
			}{{listen, &options.Connect}, {identify, &options.Identify}, {datagram, &options.Datagram}} {
				for _, word := range group.words {
					a, err := netip.ParseAddrPort(word)
					if err != nil {
						return fmt.Errorf("address to listen on: %w", err)
					}
					*group.into = append(*group.into, a)
				}
			}
			return load.Serve(cmd.Context(), options, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringSliceVar(&listen, "listen", nil, "TCP addresses whose connections are accepted and closed")
	cmd.Flags().StringSliceVar(&identify, "identify", nil, "TCP addresses that answer with the server's name")
	cmd.Flags().StringSliceVar(&datagram, "datagram", nil, "UDP addresses that answer with the server's name")
	cmd.Flags().StringVar(&options.Name, "name", "", "the server's name")
	return cmd
}

// newPodClientCommand is what client pods run.
func newPodClientCommand() *cobra.Command {
	return &cobra.Command{
		Use: scenarios.ClientCommand, Short: "the client of a client pod", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return load.Client(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// newPodWaitCommand is what a pod's container runs until clients and servers are started in it.
func newPodWaitCommand() *cobra.Command {
	return &cobra.Command{
		Use: kind.WaitCommand, Short: "hold a pod", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			<-cmd.Context().Done()
			return nil
		},
	}
}
