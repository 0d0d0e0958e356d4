// SPDX-License-Identifier: Apache-2.0

package clusters

import (
	"context"
	"fmt"

	"sigs.k8s.io/knftables"
)

// InstallConntrackHooks puts an inert table into a node's namespace: one conntrack rule and empty NAT chains. The kernel counts
// references to its conntrack and NAT hooks per namespace by such rules (nf_ct_netns_get), so the hooks stay alive.
func InstallConntrackHooks(ctx context.Context, ns *NetNS) error {
	return ns.Do(func() error {
		nft, err := knftables.New(knftables.IPv4Family, "plimsoll-conntrack")
		if err != nil {
			return fmt.Errorf("reach nft: %w", err)
		}
		tx := nft.NewTransaction()
		tx.Add(&knftables.Table{Comment: knftables.PtrTo("keeps conntrack and NAT hooks, changes nothing")})
		tx.Add(&knftables.Chain{Name: "forward", Type: knftables.PtrTo(knftables.FilterType), Hook: knftables.PtrTo(knftables.ForwardHook), Priority: knftables.PtrTo(knftables.FilterPriority)})
		tx.Add(&knftables.Rule{Chain: "forward", Rule: "ct state invalid counter"})
		for _, hook := range []struct {
			hook     knftables.BaseChainHook
			priority knftables.BaseChainPriority
		}{
			{knftables.PreroutingHook, knftables.DNATPriority}, {knftables.InputHook, knftables.SNATPriority},
			{knftables.OutputHook, knftables.DNATPriority}, {knftables.PostroutingHook, knftables.SNATPriority},
		} {
			tx.Add(&knftables.Chain{Name: "nat-" + string(hook.hook), Type: knftables.PtrTo(knftables.NATType), Hook: knftables.PtrTo(hook.hook), Priority: knftables.PtrTo(hook.priority)})
		}
		if err := nft.Run(ctx, tx); err != nil {
			return fmt.Errorf("install the inert conntrack table: %w", err)
		}
		return nil
	})
}
